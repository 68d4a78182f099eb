"""Attention problems as data, and their fp64 truth: who sees which key is written here from api.py's docstring."""

import functools
from dataclasses import dataclass

import surgery_kernels as sk
import torch
from surgery_kernels.testing import attention_truth, make_qkv

ALL_STATS = tuple(sk.STATS)


@dataclass(frozen=True)
class Case:
    """One dense problem. `sinks` is an int or one tuple of positions a sequence; the lengths are one int a sequence."""

    name: str
    batch: int = 2
    len_q: int = 17
    len_k: int = 17
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 16
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    scale: float | None = None
    sinks: int | tuple = 1
    leftpad: tuple | None = None
    used_q: tuple | None = None
    used_k: tuple | None = None

    def options(self):
        """Keyword arguments of `flash_attn_stats`."""
        return dict(
            causal=self.causal,
            window_size=self.window,
            softcap=self.softcap,
            softmax_scale=self.scale,
            sinks=self.sinks if isinstance(self.sinks, int) else torch.tensor(self.sinks, dtype=torch.int32),
            leftpad_k=int32(self.leftpad),
            seqused_q=int32(self.used_q),
            seqused_k=int32(self.used_k),
        )


def int32(values):
    return None if values is None else torch.tensor(values, dtype=torch.int32)


def visible_and_sinks(case, b):
    """[Tq, Tk] and [Tk] bool of sequence b."""
    first = case.leftpad[b] if case.leftpad else 0
    used_q = case.used_q[b] if case.used_q else case.len_q
    used_k = case.used_k[b] if case.used_k else case.len_k
    left, right = case.window
    positions = range(case.sinks) if isinstance(case.sinks, int) else case.sinks[b]
    visible = torch.zeros(case.len_q, case.len_k, dtype=torch.bool)
    for i in range(used_q):
        position = i + used_k - used_q
        low = first if left < 0 else max(first, position - left)
        high = used_k - 1
        if right >= 0:
            high = min(high, position + right)
        if case.causal:
            high = min(high, position)
        if low <= high:
            visible[i, low : high + 1] = True
    is_sink = torch.zeros(case.len_k, dtype=torch.bool)
    for position in positions:
        if first + position < case.len_k:
            is_sink[first + position] = True
    return visible, is_sink


def qkv(case, dtype, rounded_to=None):
    """Leaves q, k, v of `dtype` whose values are representable in `rounded_to`."""
    made = make_qkv(case.batch, case.len_q, case.len_k, *case.heads, case.head_dim, torch.float64, seed=3)
    return tuple(x.detach().to(rounded_to or dtype).to(dtype).requires_grad_() for x in made)


def grad_outputs(case, dtype, rounded_to=None):
    """name -> upstream gradient of out, lse and each statistic; nowhere zero, so rows that see nothing get some too."""
    generator = torch.Generator().manual_seed(11)
    out_shape = (case.batch, case.len_q, case.heads[0], case.head_dim)
    rows_shape = (case.batch, case.heads[0], case.len_q)
    rows_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def randn(shape, low, high):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(low).to(high)

    made = {"out": randn(out_shape, rounded_to or dtype, dtype)}
    for name in ("lse", *ALL_STATS):
        made[name] = randn(rows_shape, torch.float32, rows_dtype)
    return made


def plain_attention(case, q, k, v, stats=ALL_STATS):
    """name -> output by `attention_truth`, at the dtype of q, differentiable."""
    parts = []
    for b in range(case.batch):
        visible, is_sink = visible_and_sinks(case, b)
        out, lse, values = attention_truth(
            q[b],
            k[b],
            v[b],
            scale=case.head_dim**-0.5 if case.scale is None else case.scale,
            visible=visible,
            is_sink=is_sink,
            softcap=case.softcap,
            stats=stats,
        )
        parts.append({"out": out, "lse": lse, **values})
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}


class Truth:
    """fp64 outputs and gradients of one case, for inputs rounded to `rounded_to`."""

    def __init__(self, case, rounded_to):
        self.leaves = qkv(case, torch.float64, rounded_to)
        self.outputs = plain_attention(case, *self.leaves)

    def grads(self, upstream):
        """dq, dk, dv for `upstream`: name -> gradient."""
        return torch.autograd.grad(
            [self.outputs[name] for name in upstream],
            self.leaves,
            [upstream[name].double() for name in upstream],
            retain_graph=True,
            materialize_grads=True,
        )


@functools.lru_cache(maxsize=256)
def truth_of(case, rounded_to):
    return Truth(case, rounded_to)


def named_outputs(result):
    """name -> output of an AttnOutput."""
    return {"out": result.out, "lse": result.lse, **result.stats}


def each_alone_and_all(outputs, upstream):
    """Yield (label, name -> gradient): every output alone, then all of them."""
    for name in outputs:
        yield name, {name: upstream[name]}
    yield "all", {name: upstream[name] for name in outputs}


def grads_of(outputs, leaves, upstream):
    """dq, dk, dv of `outputs` for the gradients in `upstream`."""
    names = list(upstream)
    return torch.autograd.grad(
        [outputs[name] for name in names],
        leaves,
        [upstream[name] for name in names],
        retain_graph=True,
        materialize_grads=True,
    )


# relative to the largest entry of the truth, then absolute
GRAD_TOLERANCE = {torch.float64: (1e-12, 1e-13), torch.float32: (3e-6, 5e-6)}
ROWS_TOLERANCE = {torch.float64: dict(rtol=1e-10, atol=1e-12), torch.float32: dict(rtol=1e-4, atol=2e-6)}


def assert_grads_close(actual, truth, dtype, label):
    relative, absolute = GRAD_TOLERANCE[dtype]
    for name, got, want in zip(("dq", "dk", "dv"), actual, truth, strict=True):
        assert got.dtype == dtype
        allowed = relative * want.abs().max().item() + absolute if want.numel() else 0.0
        error = (got.double() - want).abs().max().item() if want.numel() else 0.0
        # `not <=` and not `>`: nan must fail
        assert error <= allowed, f"{name} from {label}: error {error:.3e}, allowed {allowed:.3e}"


def assert_rows_close(actual, truth, label, dtype=torch.float32, atol=None):
    """lse and statistics: at fp32 tolerances whatever the dtype of q, unless it is fp64."""
    tolerance = ROWS_TOLERANCE[dtype] if atol is None else {**ROWS_TOLERANCE[dtype], "atol": atol}
    torch.testing.assert_close(actual.double(), truth.detach(), **tolerance, msg=lambda m: f"{label}: {m}")
