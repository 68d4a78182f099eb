"""What each statistic adds to a tile, as functions that the kernels call under a constexpr flag.

The derivations are in stats/<name>.py. x is the exponent of a probability: p = exp2(x). A kernel compiled without
a statistic does not contain its function. They are plain functions under plain flags, never jit functions in a
tuple: of those the compile cache knows only the names, and would keep serving the binary of an edited one.
"""

import triton
import triton.language as tl

from .tiles import LN2

# exp2 of it is 0 in fp32: makes 0 * log 0 = 0 where x is -inf
FINITE: tl.constexpr = tl.constexpr(-1.0e4)
# scores this close to the maximum (relative, base 2) tie with it: another order of summation may differ so much
TIE: tl.constexpr = tl.constexpr(2.0**-20)


@triton.jit
def load_row(ptr, offs_m, end_q, other, MASKED: tl.constexpr):
    """One number a row; `other` from row end_q on when MASKED."""
    if MASKED:
        return tl.load(ptr + offs_m, mask=offs_m < end_q, other=other)
    else:
        return tl.load(ptr + offs_m)


@triton.jit
def shift_rows(row_ptrs, offset):
    """The pointers of the preprocess step moved to a head; one that is None comes back as another, to be left alone
    (triton 3.6 cannot return None)."""
    lse2_ptr, delta_ptr, sink_g_ptr, entropy_g_ptr, floor_ptr, weight_ptr = row_ptrs
    lse2 = lse2_ptr + offset
    sink_g, entropy_g, floor, weight = lse2, lse2, lse2, lse2
    if sink_g_ptr is not None:
        sink_g = sink_g_ptr + offset
    if entropy_g_ptr is not None:
        entropy_g = entropy_g_ptr + offset
    if floor_ptr is not None:
        floor = floor_ptr + offset
        weight = weight_ptr + offset
    return lse2, delta_ptr + offset, sink_g, entropy_g, floor, weight


@triton.jit
def sink_range(batch, first_key, sinks_ptr, N_SINKS: tl.constexpr):
    """[low, high) around the sink keys: the N_SINKS positions at sinks_ptr [B, N_SINKS], or the first ones if None."""
    if sinks_ptr is None:
        low = first_key
        high = first_key + N_SINKS
    else:
        low = 2147483647
        high = 0
        for j in tl.static_range(N_SINKS):
            key = first_key + tl.load(sinks_ptr + batch * N_SINKS + j)
            low = tl.minimum(low, key)
            high = tl.maximum(high, key + 1)
    return low, high


@triton.jit
def is_sink(offs_n, batch, first_key, sinks_ptr, N_SINKS: tl.constexpr):
    """Which of the keys offs_n are sinks; a position given twice is one key."""
    if sinks_ptr is None:
        hit = (offs_n >= first_key) & (offs_n < first_key + N_SINKS)
    else:
        hit = offs_n < 0
        for j in tl.static_range(N_SINKS):
            hit = hit | (offs_n == first_key + tl.load(sinks_ptr + batch * N_SINKS + j))
    return hit


@triton.jit
def sink_update(sink_i, p, sink):
    """Forward, on a tile that holds a sink key: sum of p over the sinks. sink [BLOCK_N]."""
    return sink_i + tl.sum(tl.where(sink[None, :], p, 0.0), 1)


@triton.jit
def sink_dp(dp, g, sink):
    """Backward, on a masked tile: dp += g_i [j in S], in one multiply-add. g and sink come with the axes they
    broadcast along."""
    return dp + g * sink.to(tl.float32)


@triton.jit
def entropy_update(entropy_i, l_i, m_old, m_new, alpha, p, x):
    """Forward: sum of p * x, with x = s2 - m, moved from the old maximum to the new one.

    entropy = log2(l) - entropy_i / l in bits: no difference of large numbers, whatever the scores' offset.
    """
    moved = tl.where(m_old == float("-inf"), 0.0, m_old - m_new)
    return (entropy_i + l_i * moved) * alpha + tl.sum(p * tl.maximum(x, FINITE), 1)


@triton.jit
def entropy_dp(dp, g, x):
    """Backward: dp -= g (s - lse)."""
    return dp - g * (tl.maximum(x, FINITE) * LN2)


@triton.jit
def tie_width(max_logit):
    """How far below the maximum a key still ties with it, in units of x."""
    return TIE * (1.0 + tl.abs(max_logit) * (1.0 / LN2))


@triton.jit
def max_ds(ds, weight, floor, x):
    """Backward: ds += g / ties on the keys that attain the maximum; weight = g / ties."""
    return ds + tl.where(x >= floor, weight, 0.0)


@triton.jit
def score_gradient(
    dp,
    p,
    x,
    t,
    delta,
    entropy_g,
    floor,
    weight,
    ENTROPY: tl.constexpr,
    MAX_LOGIT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """ds = p (dp + dp_stat - delta) + ds_stat, then through the softcap: d softcap tanh = 1 - t^2."""
    if ENTROPY:
        dp = entropy_dp(dp, entropy_g, x)
    ds = p * (dp - delta)
    if MAX_LOGIT:
        ds = max_ds(ds, weight, floor, x)
    if HAS_SOFTCAP:
        ds = ds * (1.0 - t * t)
    return ds
