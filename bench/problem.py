"""Tensors of a case: inputs with a strong sink, upstream gradients, and the layouts implementations want."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .shapes import Case

# bthd: [B, T, H, D] in memory. bhtd: [B, H, T, D] in memory. bhtd_view: [B, H, T, D] as a view of bthd, what
# Hugging Face hands to an attention function. Packed tensors are [total, H, D] and [H, total, D].
LAYOUTS = ("bthd", "bhtd", "bhtd_view")


@dataclass(frozen=True)
class Problem:
    """q [B, T, H, D], k and v [B, T, H_kv, D], dout as q; dsink_mass [B, H, T] fp32. Packed without the batch."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dsink_mass: Tensor

    def inputs(self, layout):
        """(q, k, v) leaves and the gradient of out, in a layout."""
        leaves = tuple(arrange(x, layout).detach().requires_grad_() for x in (self.q, self.k, self.v))
        return leaves, arrange(self.dout, layout)

    def nbytes(self):
        return sum(x.nbytes for x in (self.q, self.k, self.v, self.dout, self.dsink_mass))


def arrange(x, layout):
    """A tensor of bthd order in another layout."""
    if layout == "bthd":
        return x
    x = x.transpose(-3, -2)
    return x.contiguous() if layout == "bhtd" else x


def restore(x, layout):
    """Back to bthd order, as a view."""
    return x if layout == "bthd" else x.transpose(-3, -2)


def make_problem(case, device="cpu", seed=0):
    """Random tensors of `case`; the first key of each sequence takes a large share of the attention, as in real models.

    Rows beyond a padded sequence's end have upstream gradient 0.
    """
    generator = torch.Generator(device).manual_seed(seed)
    heads, rows = case.heads, case.starts[-1] if case.kind == "packed" else case.length
    lead = () if case.kind == "packed" else (case.batch,)

    def randn(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    # q leans towards u, and the sink's k towards it so far that its score is about log T + 2
    q = 1.5 * randn(*lead, rows, heads.heads, heads.head_dim) + 1.0
    k = randn(*lead, rows, heads.kv_heads, heads.head_dim)
    v = randn(*lead, rows, heads.kv_heads, heads.head_dim)
    lean = (math.log(case.length) + 2) / math.sqrt(heads.head_dim)
    if case.kind == "packed":
        k[list(case.starts[:-1])] += lean
    else:
        k[:, 0] += lean
    dout = randn(*q.shape)
    dsink_mass = randn(*lead, heads.heads, rows)
    if case.kind == "padded":
        for b, used in enumerate(case.lengths):
            dout[b, used:] = 0
            dsink_mass[b, :, used:] = 0
    cast = (x.to(case.torch_dtype) for x in (q, k, v, dout))
    return Problem(case, *cast, dsink_mass)
