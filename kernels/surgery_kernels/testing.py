"""Inputs, the fp64 truth and the error rule that tests/ and bench/ share."""

import torch

from .stats import STATS


def make_qkv(batch, len_q, len_k, n_heads, n_kv, head_dim, dtype=torch.float32, seed=0, device="cpu"):
    """Random q [B, Tq, H, D], k and v [B, Tk, H_kv, D] with peaky attention, and requires_grad."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, len_q, n_heads, head_dim), *((batch, len_k, n_kv, head_dim),) * 2)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return tuple(x.to(device, dtype).requires_grad_() for x in (q * 1.5, k, v))


def attention_truth(q, k, v, *, scale, visible, is_sink, softcap=0.0, stats=("sink_mass",)):
    """Attention written out in plain differentiable torch, one sequence, for autograd in fp64.

    Args:
        q: [Tq, H, D]; k, v: [Tk, H_kv, D].
        visible: [Tq, Tk] bool; is_sink: [Tk] bool.
    Returns:
        out [Tq, H, D], lse [H, Tq], dict name -> [H, Tq].
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = torch.einsum("ihd,jhd->hij", q, k) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    seen = visible.any(-1)
    # softmax of an all -inf row is nan even in its unused gradient, so such rows never enter the graph
    s = s[:, seen].masked_fill(~visible[seen], float("-inf"))
    lse_seen = torch.logsumexp(s, -1)
    p = torch.softmax(s, -1)
    out = q.new_zeros(q.shape).index_put((seen.nonzero()[:, 0],), torch.einsum("hij,jhd->ihd", p, v))

    def rows(x, fill):
        return x.new_full((x.shape[0], seen.shape[0]), fill).index_put((slice_all(x), seen.nonzero()[:, 0]), x)

    def slice_all(x):
        return torch.arange(x.shape[0])[:, None]

    is_sink = is_sink.to(s.dtype)
    values = {name: rows(STATS[name].value(s, p, lse_seen, is_sink), 0.0) for name in stats}
    return out, rows(lse_seen, float("-inf")), values


def assert_no_worse_than_baseline(actual, truth, baseline, factor=2.0, name=""):
    """The 2x rule: |actual - truth| is at most `factor` times |baseline - truth|, plus one rounding of truth.

    Args:
        actual: what is tested; truth: fp64; baseline: plain PyTorch at actual's dtype.
    Raises:
        AssertionError: with both errors.
    """
    error = (actual.double() - truth).abs().max().item()
    allowed = factor * (baseline.double() - truth).abs().max().item()
    allowed += torch.finfo(actual.dtype).eps * truth.abs().max().item()
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"
