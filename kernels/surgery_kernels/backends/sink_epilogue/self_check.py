"""A vendor backend, once for each kind of problem on each device, against attention written out in fp64.

No release of ours has run on every GPU, and a vendor's kernel may change under us, so a backend is only taken after
it computed a small problem of the same kind (dtype, head dim, masks, packing) correctly. A kernel that fails or
raises is a reason against the backend. SURGERY_SELF_CHECK=0 leaves the check out.
"""

import itertools
import logging
import os
from typing import NamedTuple

import torch

from ...types import AttnInputs

logger = logging.getLogger("surgery_kernels")

# largest error allowed, relative to the largest number of the tensor
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
ROWS_TOLERANCE = 1e-3
LENGTH, N_SINKS = 333, 3
HEAD_DIMS = range(8, 257, 8)

_backends = {}
_found = {}


class Kind(NamedTuple):
    """What a check stands for. `layout` is dense, padded or packed."""

    dtype: torch.dtype
    head_dim: int
    grouped: bool
    causal: bool
    window: tuple[bool, bool]
    softcap: bool
    layout: str


def kind_of(inputs):
    """The Kind of a problem, as a plain tuple: tracing mistakes a named one.

    With dynamic shapes numbers are symbolic while tracing; a branch on one is a constant and a guard.
    """
    padded = any(x is not None for x in (inputs.leftpad_k, inputs.seqused_q, inputs.seqused_k))
    return (
        inputs.q.dtype,
        _known(inputs.q.shape[-1]),
        _branch(inputs.q.shape[-2] > inputs.k.shape[-2]),
        inputs.causal,
        tuple(_branch(side >= 0) for side in inputs.window_size),
        _branch(inputs.softcap > 0),
        "packed" if inputs.is_varlen else "padded" if padded else "dense",
    )


def _branch(condition):
    # not bool(condition): that stays symbolic
    if condition:  # noqa: SIM103
        return True
    return False


def _known(head_dim):
    for size in HEAD_DIMS:
        if head_dim == size:
            return size
    raise AssertionError(f"head_dim {head_dim} was refused before")


def failures(backend, kind, index):
    """What a backend computes wrongly for a Kind on CUDA device `index`: a tuple of reasons, empty if nothing.

    The check runs once and its answer is kept; while a CUDA graph is captured it cannot run.

    Args:
        backend: name of a Backend that `register` was called for.
        kind: see `kind_of`.
    """
    if os.environ.get("SURGERY_SELF_CHECK") == "0":
        return ()
    kind = Kind(*kind)
    key = (backend, kind, index)
    if key not in _found:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return ("its self-check cannot run while a CUDA graph is captured: call it once before",)
        _found[key] = _check(_backends[backend], kind, _device(index))
    return _found[key]


# asked while tracing, as the triton backend's device reasons are: a constant of the arguments
failures._dynamo_marked_constant = True


def _device(index):
    return torch.device("cuda", index)


def register(backend):
    """Make a Backend known to `failures`, which takes names: tracing can keep a name, not an object."""
    _backends[backend.name] = backend
    return backend


def _check(backend, kind, device):
    try:
        wrong = {name: error for name, error in errors(backend, kind, device).items() if not error <= 1.0}
    except Exception as failure:
        # whatever the vendor raises, another backend may do
        found = (f"its self-check raises {type(failure).__name__}: {str(failure).strip()[:300]}",)
    else:
        found = tuple(f"its self-check is wrong in {name}, {error:.3g} x tolerance" for name, error in wrong.items())
    if found:
        logger.warning("backend %r is not used for %s on %s: %s", backend.name, kind, device, "; ".join(found))
    return found


def errors(backend, kind, device):
    """name -> largest error of an output or gradient, in units of the tolerance."""
    inputs = small_problem(kind, device)
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(inputs.q.shape, generator=generator)
    # rows without a gradient of out, as in the last layer of a probe
    dout[..., 5:70, :, :] = 0.0
    dout = dout.to(device, kind.dtype)
    dlse, dmass = torch.randn((2, *inputs.rows_shape), generator=generator).to(device)
    with torch.no_grad(), torch.autocast("cuda", enabled=False):
        out, lse, stats = backend.forward(inputs)
        grads = backend.backward(inputs, out, lse, stats, dout, dlse, dmass[None])
        truth = written_out(inputs, dout, dlse, dmass)
    got = dict(zip(truth, (out, lse, stats[0], *grads), strict=True))
    unit = {name: ROWS_TOLERANCE if name in ("lse", "sink_mass") else TOLERANCE[kind.dtype] for name in truth}
    return {name: _error(got[name].double(), truth[name]) / unit[name] for name in truth}


def _error(got, truth):
    if not torch.equal(got.isneginf(), truth.isneginf()):
        return float("inf")
    seen = truth.isfinite()
    return ((got - truth)[seen].abs().max() / truth[seen].abs().max()).item()


def small_problem(kind, device):
    """AttnInputs of a Kind: more than one tile, lengths that are no multiple of one, a sequence without keys."""
    generator = torch.Generator().manual_seed(0)
    heads, packed = (4 if kind.grouped else 2, 2), kind.layout == "packed"
    # padded: the first real key, the end of the real rows and keys
    first, end = (0, 40, 5, 9), (LENGTH, 300, 190, 9)
    lead = (sum(end),) if packed else (len(end), LENGTH)
    q, k, v = (torch.randn((*lead, n, kind.head_dim), generator=generator) for n in (heads[0], heads[1], heads[1]))

    def int32(values):
        return torch.tensor(values, dtype=torch.int32, device=device)

    starts = int32((0, *itertools.accumulate(end))) if packed else None
    lengths = {}
    if kind.layout == "padded":
        lengths = {"leftpad_k": int32(first), "seqused_q": int32(end), "seqused_k": int32(end)}
    return AttnInputs(
        *(x.to(device, kind.dtype) for x in (q, k, v)),
        kind.head_dim**-0.5,
        kind.causal,
        tuple(width if bounded else -1 for bounded, width in zip(kind.window, (150, 70), strict=True)),
        20.0 if kind.softcap else 0.0,
        n_sinks=N_SINKS,
        cu_seqlens_q=starts,
        cu_seqlens_k=starts,
        max_seqlen_q=LENGTH,
        max_seqlen_k=LENGTH,
        **lengths,
    )


def written_out(inputs, dout, dlse, dmass):
    """name -> fp64 outputs and gradients of self-attention, formula by formula: in an operator autograd sleeps."""
    rows, zeros = inputs.rows_shape, inputs.q.double().new_zeros
    names = ("out", "lse", "sink_mass", "dq", "dk", "dv")
    shapes = (inputs.q.shape, rows, rows, inputs.q.shape, inputs.k.shape, inputs.k.shape)
    truth = {name: zeros(shape) for name, shape in zip(names, shapes, strict=True)}
    truth["lse"].fill_(float("-inf"))
    for at, first, end in _sequences(inputs):
        _write_one(inputs, at, first, end, dout, dlse, dmass, truth)
    return truth


def _sequences(inputs):
    """(index of a tensor's tokens, first real key, end of the real tokens) of each sequence."""
    if inputs.is_varlen:
        for start, stop in itertools.pairwise(inputs.cu_seqlens_q.tolist()):
            yield (slice(start, stop),), 0, stop - start
        return
    for b in range(inputs.q.shape[0]):
        padded = inputs.leftpad_k is not None
        first, end = (int(inputs.leftpad_k[b]), int(inputs.seqused_k[b])) if padded else (0, LENGTH)
        yield (b, slice(0, end)), first, end


def _write_one(inputs, at, first, end, dout, dlse, dmass, truth):
    heads, group = inputs.q.shape[-2], inputs.q.shape[-2] // inputs.k.shape[-2]
    q, do = inputs.q[at].double(), dout[at].double()
    k, v = (x[at].double().repeat_interleave(group, 1) for x in (inputs.k, inputs.v))
    # rows of a sequence, [H, T]
    of_rows = (slice(None), *at) if len(at) == 1 else (at[0], slice(None), at[1])
    g_lse, g = dlse[of_rows].double()[..., None], dmass[of_rows].double()[..., None]
    i, j = torch.arange(end, device=q.device)[:, None], torch.arange(end, device=q.device)
    left, right = inputs.window_bounds
    visible = (j >= first) & ((right < 0) | (j <= i + right)) & ((left < 0) | (j >= i - left))
    seen = visible.any(-1)
    s = torch.einsum("ihd,jhd->hij", q, k) * inputs.softmax_scale
    slope = torch.full_like(s, inputs.softmax_scale)
    if inputs.softcap:
        t = torch.tanh(s / inputs.softcap)
        s, slope = inputs.softcap * t, slope * (1 - t * t)
    s = s.masked_fill(~visible, float("-inf"))
    lse = torch.logsumexp(s, -1)
    p = torch.exp(s - lse.masked_fill(~seen, 0.0)[..., None])
    is_sink = (j >= first) & (j < first + inputs.n_sinks)
    mass = (p * is_sink).sum(-1)
    dp = torch.einsum("ihd,jhd->hij", do, v) + g * is_sink
    ds = p * (dp - (p * dp).sum(-1, keepdim=True) + g_lse) * slope
    truth["out"][at] = torch.einsum("hij,jhd->ihd", p, v)
    truth["lse"][of_rows], truth["sink_mass"][of_rows] = lse, mass
    truth["dq"][at] = torch.einsum("hij,jhd->ihd", ds, k)
    for name, weight, x in (("dk", ds, q), ("dv", p, do)):
        truth[name][at] = torch.einsum("hij,ihd->jhd", weight, x).unflatten(1, (heads // group, group)).sum(2)
