"""Problems for the Triton backend, and the fp64 autograd truth of each."""

import os
from dataclasses import dataclass
from unittest import mock

import pytest
import surgery_kernels as sk
import torch
from surgery_kernels.testing import assert_no_worse_than_baseline, attention_truth, make_qkv

ALL_STATS = ("sink_mass", "entropy", "max_logit")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = {"TRITON_INTERPRET": "1"} if DEVICE == "cpu" else {}

# read when triton and the kernels are first imported; left set it would offer the backend to every other CPU test
with mock.patch.dict(os.environ, INTERPRETED):
    pytest.importorskip("triton")
    from surgery_kernels.backends.triton import columns  # noqa: F401
    from surgery_kernels.backends.triton import run as launcher  # noqa: F401


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Without a GPU the kernels run in Triton's interpreter; a test module imports this to switch it on."""
    for name, value in INTERPRETED.items():
        monkeypatch.setenv(name, value)


@dataclass(frozen=True)
class Case:
    """Options of one call. `lengths` (packed): ((len_q, len_k), ...); else `batch` times len_q and len_k."""

    len_q: int = 33
    len_k: int = 33
    batch: int = 1
    n_heads: int = 2
    n_kv: int = 1
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    lengths: tuple = ()
    causal: bool = True
    window_size: tuple = (-1, -1)
    softcap: float = 0.0
    softmax_scale: float | None = None
    sinks: object = 1
    leftpad_k: tuple | None = None
    seqused_q: tuple | None = None
    seqused_k: tuple | None = None
    stats: tuple = ALL_STATS
    seed: int = 0

    def qkv(self):
        len_q, len_k, batch = self.len_q, self.len_k, self.batch
        if self.lengths:
            len_q, len_k, batch = *(sum(x) for x in zip(*self.lengths, strict=True)), 1
        shape = (batch, len_q, len_k, self.n_heads, self.n_kv, self.head_dim)
        qkv = make_qkv(*shape, dtype=self.dtype, seed=self.seed, device=DEVICE)
        return tuple(x.detach()[0] if self.lengths else x.detach() for x in qkv)

    def call(self, q, k, v, backend="triton"):
        """AttnOutput of the public function."""
        sinks = self.sinks if isinstance(self.sinks, int) else _int32(self.sinks)
        options = {
            name: getattr(self, name) for name in ("softmax_scale", "causal", "window_size", "softcap", "stats")
        } | {"sinks": sinks, "backend": backend}
        if self.lengths:
            cu_q, cu_k = (_int32([0, *x]).cumsum(0).int() for x in zip(*self.lengths, strict=True))
            longest = (max(x) for x in zip(*self.lengths, strict=True))
            return sk.flash_attn_stats_varlen(q, k, v, cu_q, cu_k, *longest, **options)
        for name in ("leftpad_k", "seqused_q", "seqused_k"):
            if getattr(self, name) is not None:
                options[name] = _int32(getattr(self, name))
        return sk.flash_attn_stats(q, k, v, **options)

    def sequences(self):
        """(rows of q, rows of k, batch index or None, first_key, used_q, used_k, sinks) of each sequence."""
        start_q = start_k = 0
        for b in range(len(self.lengths) or self.batch):
            sinks = range(self.sinks) if isinstance(self.sinks, int) else self.sinks[b]
            if self.lengths:
                len_q, len_k = self.lengths[b]
                of_q, of_k = slice(start_q, start_q + len_q), slice(start_k, start_k + len_k)
                start_q, start_k = of_q.stop, of_k.stop
                yield of_q, of_k, None, 0, len_q, len_k, sinks
            else:
                first = self.leftpad_k[b] if self.leftpad_k else 0
                used_q = self.seqused_q[b] if self.seqused_q else self.len_q
                used_k = self.seqused_k[b] if self.seqused_k else self.len_k
                yield slice(None), slice(None), b, first, used_q, used_k, sinks

    def truth(self, q, k, v):
        """out, lse, *stats in fp64 by plain torch, differentiable in q, k, v (fp64)."""
        scale = self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale
        parts = []
        for of_q, of_k, b, first, used_q, used_k, sinks in self.sequences():
            one_q, one_k, one_v = (x[b] if b is not None else x[of] for x, of in ((q, of_q), (k, of_k), (v, of_k)))
            if one_k.shape[0] == 0:
                # a key that nobody sees, for the statistics that take a maximum over keys
                one_k, one_v = (x.new_zeros(1, *x.shape[1:]) for x in (k, v))
                used_k = 0
            row = torch.arange(one_q.shape[0], device=q.device)[:, None]
            key = torch.arange(one_k.shape[0], device=q.device)[None, :]
            position = row + used_k - used_q
            left, right = self.window_size[0], 0 if self.causal else self.window_size[1]
            visible = (key >= first) & (key < used_k) & (row < used_q)
            if right >= 0:
                visible &= key <= position + right
            if left >= 0:
                visible &= key >= position - left
            is_sink = torch.isin(key[0] - first, torch.tensor(list(sinks), dtype=torch.long, device=q.device))
            out, lse, stats = attention_truth(
                one_q,
                one_k,
                one_v,
                scale=scale,
                visible=visible,
                is_sink=is_sink,
                softcap=self.softcap,
                stats=self.stats,
            )
            parts.append((out, lse, *stats.values()))
        out, *rows = zip(*parts, strict=True)
        if self.lengths:
            return torch.cat(out), *(torch.cat(x, -1) for x in rows)
        return torch.stack(out), *(torch.stack(x) for x in rows)


def _int32(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def finite(x):
    """x with 0 for the -inf that lse is where a row sees no key."""
    return torch.where(x.isinf(), 0.0, x)


def weights_for(outputs, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device) for x in outputs]


def run(case, qkv, which=None, truth=False, backend="triton"):
    """Outputs and gradients of q, k, v for random weights on the outputs numbered in `which` (all by default).

    Returns:
        [out, lse, *stats], [dq, dk, dv], detached.
    """
    qkv = [x.detach().double() if truth else x.detach() for x in qkv]
    for x in qkv:
        x.requires_grad_()
    if truth:
        outputs = list(case.truth(*qkv))
    else:
        result = case.call(*qkv, backend=backend)
        outputs = [result.out, result.lse, *result.stats.values()]
    weights = weights_for(outputs)
    chosen = range(len(outputs)) if which is None else which
    loss = sum((finite(outputs[i]) * weights[i].to(outputs[i].dtype)).sum() for i in chosen)
    grads = [torch.zeros_like(x) for x in qkv]
    if loss.requires_grad:
        found = torch.autograd.grad(loss, qkv, allow_unused=True)
        grads = [zero if g is None else g for g, zero in zip(found, grads, strict=True)]
    return [x.detach() for x in outputs], grads


def baseline(case, qkv, which=None):
    """Plain torch at the case's dtype: the error that is allowed twice."""
    cast = [x.detach().clone().requires_grad_() for x in qkv]
    outputs = list(case.truth(*cast))
    weights = weights_for(outputs)
    chosen = range(len(outputs)) if which is None else which
    loss = sum((finite(outputs[i]).double() * weights[i]).sum() for i in chosen)
    return [x.detach() for x in outputs], list(torch.autograd.grad(loss, cast))


def check(case, which=None, qkv=None):
    """Forward and gradients against fp64: fp32 by tolerance, fp16 by the 2x rule, rows always as fp32."""
    qkv = case.qkv() if qkv is None else qkv
    outputs, grads = run(case, qkv, which)
    true_outputs, true_grads = run(case, qkv, which, truth=True)
    names = ["out", "lse", *case.stats]
    for name, actual, expected in zip(names[1:], outputs[1:], true_outputs[1:], strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    pairs = list(zip(["out", "dq", "dk", "dv"], [outputs[0], *grads], [true_outputs[0], *true_grads], strict=True))
    if case.dtype == torch.float32:
        for name, actual, expected in pairs:
            atol = 2e-5 * (1 + expected.abs().max().item()) if expected.numel() else 0.0
            torch.testing.assert_close(actual.double(), expected, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
        return
    plain_outputs, plain_grads = baseline(case, qkv, which)
    for (name, actual, expected), plain in zip(pairs, [plain_outputs[0], *plain_grads], strict=True):
        assert_no_worse_than_baseline(actual, expected, plain, name=name)
