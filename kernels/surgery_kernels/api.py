"""The public functions: validation, defaults and the choice of a backend. No mathematics.

Shapes: B sequences, Tq and Tk lengths, H query heads, H_kv key heads (H a multiple of H_kv), D head dim.
"""

import itertools
import math
import operator

import torch

from .backends import choose_backend
from .ops import run
from .stats import STATS
from .types import AttnInputs, AttnOutput

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def flash_attn_stats(
    q,
    k,
    v,
    softmax_scale=None,
    causal=True,
    window_size=(-1, -1),
    softcap=0.0,
    sinks=1,
    stats=("sink_mass",),
    leftpad_k=None,
    seqused_q=None,
    seqused_k=None,
    backend="auto",
):
    """Attention, its log-sum-exp and per-row statistics, all differentiable.

        s_ij = softmax_scale * q_i . k_j, softcapped;  p = softmax(s);  out = p @ v;  lse = logsumexp(s)

    `causal` and `window_size` are aligned at the bottom right: row i stands at key i + seqused_k - seqused_q.
    A row that sees no key has out 0, lse -inf, statistics 0 and gradient 0. Under autocast q, k and v are cast as
    for torch's own attention. Higher-order gradients are not supported and raise.

    Args:
        q: [B, Tq, H, D] fp64, fp32, bf16 or fp16.
        k, v: [B, Tk, H_kv, D], dtype and device of q.
        softmax_scale: default D ** -0.5.
        causal: row i sees no key behind its own position.
        window_size: (left, right), -1 is unbounded: key j is seen iff i - left <= j <= i + right.
        softcap: s = softcap * tanh(s / softcap); 0 is off.
        sinks: the sink keys, counted from each sequence's first real key: an int n for the first n, or int32
            [B, n] positions. A sequence shorter than n has fewer.
        stats: names from STATS, any subset; () for none.
        leftpad_k, seqused_q, seqused_k: int32 [B], default 0, Tq, Tk: the real keys of sequence b are
            [leftpad_k[b], seqused_k[b]), its real rows [0, seqused_q[b]).
        backend: a key of BACKENDS, which raises when it cannot run this, or "auto".
    Returns:
        AttnOutput: out [B, Tq, H, D], lse [B, H, Tq] fp32, stats: dict of [B, H, Tq] fp32.
    Raises:
        ValueError: wrong shapes, dtypes, devices or options, sinks outside the sequence, unknown names.
    """
    inputs = make_inputs(
        q, k, v, softmax_scale, causal, window_size, softcap, sinks, stats, leftpad_k, seqused_q, seqused_k
    )
    return _run(inputs, backend)


def flash_attn_stats_varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    softmax_scale=None,
    causal=True,
    window_size=(-1, -1),
    softcap=0.0,
    sinks=1,
    stats=("sink_mass",),
    backend="auto",
):
    """`flash_attn_stats` on packed sequences: sequence b owns rows [cu_seqlens_q[b], cu_seqlens_q[b + 1]).

    Args:
        q: [total_q, H, D].
        k, v: [total_k, H_kv, D].
        cu_seqlens_q, cu_seqlens_k: int32 [N + 1], start of each sequence, then the total.
        max_seqlen_q, max_seqlen_k: longest sequence (an upper bound will do).
        sinks: int n, or int32 [N, n] positions in each sequence.
        softmax_scale, causal, window_size, softcap, stats, backend: as in `flash_attn_stats`.
    Returns:
        AttnOutput: out [total_q, H, D], lse [H, total_q] fp32, stats: dict of [H, total_q] fp32.
    Raises:
        ValueError: as `flash_attn_stats`.
    """
    inputs = make_inputs(
        q,
        k,
        v,
        softmax_scale,
        causal,
        window_size,
        softcap,
        sinks,
        stats,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
    return _run(inputs, backend)


def make_inputs(
    q,
    k,
    v,
    softmax_scale=None,
    causal=True,
    window_size=(-1, -1),
    softcap=0.0,
    sinks=1,
    stats=("sink_mass",),
    leftpad_k=None,
    seqused_q=None,
    seqused_k=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
):
    """Validate the arguments of `flash_attn_stats` (or of the packed form, with `cu_seqlens_*`) and fill defaults.

    Returns:
        AttnInputs, for `attn_forward`, `choose_backend` and `column_mass`.
    Raises:
        ValueError: as `flash_attn_stats`.
    """
    q, k, v = _autocast(q, k, v)
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    _check_qkv(q, k, v, packed)
    if packed:
        batch = _check_packed(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    else:
        batch, max_seqlen_q, max_seqlen_k = q.shape[0], q.shape[1], k.shape[1]
    for name, lengths, longest in (
        ("leftpad_k", leftpad_k, max_seqlen_k),
        ("seqused_q", seqused_q, max_seqlen_q),
        ("seqused_k", seqused_k, max_seqlen_k),
    ):
        if packed and lengths is not None:
            raise ValueError(f"{name} must be None for packed sequences, which have no padding, got {lengths}")
        _check_lengths(name, lengths, batch, longest, q.device)
    n_sinks, sinks = _check_sinks(sinks, batch, max_seqlen_k, q.device)
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    # comparisons and not math.isfinite: torch.compile with dynamic shapes traces them
    if not abs(softmax_scale) < math.inf:
        raise ValueError(f"softmax_scale must be finite, got {softmax_scale}")
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"softcap must be 0 (off) or positive, got {softcap}")
    return AttnInputs(
        q,
        k,
        v,
        float(softmax_scale),
        bool(causal),
        _check_window(window_size),
        float(softcap),
        _check_stats(stats),
        n_sinks,
        sinks,
        leftpad_k,
        seqused_q,
        seqused_k,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
    )


def _run(inputs, backend):
    out, lse, stats = run(inputs, choose_backend(inputs, backend))
    return AttnOutput(out, lse, {name: stats[index] for index, name in enumerate(inputs.stats)})


def _autocast(q, k, v):
    # what is not a float tensor passes as it is, for _check_qkv to name it
    if not isinstance(q, torch.Tensor) or q.is_meta:
        return q, k, v
    if not torch.is_autocast_enabled(q.device.type):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    eligible = (torch.float32, torch.bfloat16, torch.float16)
    return tuple(x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype in eligible else x for x in (q, k, v))


def _check_qkv(q, k, v, packed):
    dims, layout = (3, "[total, H, D]") if packed else (4, "[B, T, H, D]")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dim() != dims:
            raise ValueError(f"{name} must be {layout}, got shape {tuple(x.shape)}")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} must be one of {DTYPES}, got {x.dtype}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} must be {q.dtype} on {q.device} as q, got {x.dtype} on {x.device}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    if k.shape[-1] != q.shape[-1] or q.shape[-1] == 0:
        raise ValueError(f"q and k must share a head dim of at least 1, got {q.shape[-1]} and {k.shape[-1]}")
    if k.shape[-2] == 0 or q.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"the heads of q must be a multiple of those of k, got {q.shape[-2]} and {k.shape[-2]}")
    if not packed and q.shape[0] != k.shape[0]:
        raise ValueError(f"q and k must have one batch size, got {q.shape[0]} and {k.shape[0]}")


def _check_packed(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        wrong = not isinstance(cu_seqlens, torch.Tensor)
        # while tracing, the number of sequences may be unknown
        empty = not wrong and not torch.compiler.is_compiling() and cu_seqlens.numel() == 0
        if wrong or empty or cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32:
            got = repr(cu_seqlens) if wrong else f"{tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
            raise ValueError(f"{name} must be int32 [N + 1], got {got}")
        if cu_seqlens.device != q.device:
            raise ValueError(f"{name} must be on {q.device} as q, got {cu_seqlens.device}")
    if cu_seqlens_q.shape[0] != cu_seqlens_k.shape[0]:
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must have one length, got {cu_seqlens_q.shape[0]} and "
            f"{cu_seqlens_k.shape[0]}"
        )
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if longest is None or longest < 0:
            raise ValueError(f"{name} must be an int >= 0, got {longest}")
    if not torch.compiler.is_compiling():
        _check_cu_seqlens("q", cu_seqlens_q, q.shape[0], max_seqlen_q)
        _check_cu_seqlens("k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    return cu_seqlens_q.shape[0] - 1


def _check_cu_seqlens(side, cu_seqlens, total, max_seqlen):
    # on a GPU this would wait for the device; a kernel reads past nothing there because starts are clamped
    if cu_seqlens.device.type != "cpu" or _is_fake(cu_seqlens):
        return
    starts = cu_seqlens.tolist()
    if starts[0] != 0 or starts[-1] != total or any(b < a for a, b in itertools.pairwise(starts)):
        raise ValueError(f"cu_seqlens_{side} must rise from 0 to {total}, got {starts}")
    longest = max((b - a for a, b in itertools.pairwise(starts)), default=0)
    if max_seqlen < longest:
        raise ValueError(f"max_seqlen_{side} must be at least {longest}, the longest sequence, got {max_seqlen}")


def _check_lengths(name, lengths, batch, longest, device):
    if lengths is None:
        return
    if not isinstance(lengths, torch.Tensor) or lengths.dtype != torch.int32 or tuple(lengths.shape) != (batch,):
        got = f"{tuple(lengths.shape)} {lengths.dtype}" if isinstance(lengths, torch.Tensor) else repr(lengths)
        raise ValueError(f"{name} must be int32 [{batch}], got {got}")
    if lengths.device != device:
        raise ValueError(f"{name} must be on {device} as q, got {lengths.device}")
    # on a GPU this would wait for the device
    if torch.compiler.is_compiling() or device.type != "cpu" or _is_fake(lengths) or batch == 0:
        return
    low, high = lengths.min().item(), lengths.max().item()
    if low < 0 or high > longest:
        raise ValueError(f"{name} must lie in [0, {longest}], got {low} to {high}")


def _check_sinks(sinks, batch, max_seqlen_k, device):
    if isinstance(sinks, torch.Tensor):
        if sinks.dtype != torch.int32 or sinks.dim() != 2 or sinks.shape[0] != batch:
            raise ValueError(f"sinks must be an int or int32 [{batch}, n], got {tuple(sinks.shape)} {sinks.dtype}")
        if sinks.device != device:
            raise ValueError(f"sinks must be on {device} as q, got {sinks.device}")
        _check_positions(sinks, max_seqlen_k)
        return sinks.shape[1], sinks
    if isinstance(sinks, bool) or not isinstance(sinks, int):
        raise ValueError(f"sinks must be an int or an int32 tensor [{batch}, n], got {sinks!r}")
    if sinks < 0 or (sinks > max_seqlen_k and batch and max_seqlen_k):
        raise ValueError(f"sinks must be in [0, {max_seqlen_k}], the longest sequence of keys, got {sinks}")
    return sinks, None


def _check_positions(sinks, max_seqlen_k):
    if torch.compiler.is_compiling() or _is_fake(sinks) or sinks.numel() == 0:
        return
    inside = ((sinks >= 0) & (sinks < max_seqlen_k)).all()
    if sinks.device.type == "cuda":
        # no wait for the device: the assertion reports at the next synchronisation
        torch._assert_async(inside, f"sinks must lie in [0, {max_seqlen_k})")
    elif not inside:
        raise ValueError(f"sinks must lie in [0, {max_seqlen_k}), got {sinks.min()} to {sinks.max()}")


def _is_fake(x):
    return isinstance(x, torch._subclasses.FakeTensor)


def _check_window(window_size):
    try:
        left, right = (operator.index(x) for x in window_size)
    except (TypeError, ValueError):
        raise ValueError(f"window_size must be two ints (left, right), -1 is unbounded, got {window_size!r}") from None
    if left < -1 or right < -1:
        raise ValueError(f"window_size must be >= -1 on both sides, got {window_size!r}")
    return left, right


def _check_stats(stats):
    if isinstance(stats, str):
        raise ValueError(f"stats must be a tuple of names, got the string {stats!r}; write ({stats!r},)")
    stats = tuple(stats)
    unknown = [name for name in stats if name not in STATS]
    if unknown or len(set(stats)) != len(stats):
        raise ValueError(f"stats must be distinct names out of {tuple(STATS)}, got {stats}")
    return stats
