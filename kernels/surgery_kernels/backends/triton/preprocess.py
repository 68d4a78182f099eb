"""Before the backward: everything that is one number a row.

With g = dL/d statistic, ds_ij = p_ij (dp_ij + dp_stat_ij - delta_i) + ds_stat_ij, where

    delta_i = rowsum(dout * out) - dlse_i + g_sink * sink_mass_i + g_entropy * entropy_i

so lse costs the main kernels nothing, and the other two only what varies along the keys. lse2 = lse * log2(e) is
+inf for a row that sees no key: exp2(s2 - lse2) = 0 then, and its gradients (g, dlse) are dropped here.
max_logit needs to know how many keys tie; `_max_ties_kernel` counts them, when its gradient is asked for.
"""

import triton
import triton.language as tl

from . import stat_hooks as hooks
from .blocks import block_start, count_blocks, in_window, key_blocks, sequence_bounds
from .tiles import LOG2E, cap, dot_rows, head_ptr, load_rows, row_offset


@triton.jit
def _preprocess_kernel(
    out_ptr,
    dout_ptr,
    lse_ptr,
    dlse_ptr,
    seq,
    stat_ptrs,
    dstat_ptrs,
    row_ptrs,
    out_strides,
    dout_strides,
    row_strides,
    total_q,
    total_k,
    n_heads,
    n_blocks,
    OUT_STEPS: tl.constexpr,
    DOUT_STEPS: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta, lse2 and the statistics' gradients with nothing in the rows that see no key."""
    sink_ptr, entropy_ptr, _ = stat_ptrs
    dsink_ptr, dentropy_ptr, _ = dstat_ptrs
    lse2_ptr, delta_ptr, g_sink_ptr, g_entropy_ptr, _, _ = row_ptrs
    pid = tl.program_id(0)
    m0 = pid % n_blocks * BLOCK_M
    batch = pid // n_blocks // n_heads
    head = pid // n_blocks % n_heads
    start_q, _, len_q, _, end_q, _, _, _ = sequence_bounds(batch, seq, total_q, total_k)
    if m0 >= len_q:
        return

    offs_m = m0 + tl.arange(0, BLOCK_M)
    in_rows = offs_m < len_q
    rows = row_offset(row_strides, batch, head, start_q) + offs_m
    lse = tl.load(lse_ptr + rows, mask=in_rows, other=float("-inf"))
    sees = (lse != float("-inf")) & (offs_m < end_q)
    delta = tl.zeros([BLOCK_M], tl.float32)
    if dout_ptr is not None:
        out = head_ptr(out_ptr, out_strides, OUT_STEPS, batch, head, start_q)
        dout = head_ptr(dout_ptr, dout_strides, DOUT_STEPS, batch, head, start_q)
        o0, o1 = load_rows(out, m0, end_q, OUT_STEPS, BLOCK_M, D0, D1, D, True)
        do0, do1 = load_rows(dout, m0, end_q, DOUT_STEPS, BLOCK_M, D0, D1, D, True)
        delta += tl.sum(o0.to(tl.float32) * do0.to(tl.float32), 1)
        if D1 > 0:
            delta += tl.sum(o1.to(tl.float32) * do1.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + rows, mask=in_rows, other=0.0)
    if dsink_ptr is not None:
        g = tl.load(dsink_ptr + rows, mask=in_rows, other=0.0)
        delta += g * tl.load(sink_ptr + rows, mask=in_rows, other=0.0)
        tl.store(g_sink_ptr + rows, tl.where(sees, g, 0.0), mask=in_rows)
    if dentropy_ptr is not None:
        g = tl.load(dentropy_ptr + rows, mask=in_rows, other=0.0)
        delta += g * tl.load(entropy_ptr + rows, mask=in_rows, other=0.0)
        tl.store(g_entropy_ptr + rows, tl.where(sees, g, 0.0), mask=in_rows)
    tl.store(delta_ptr + rows, tl.where(sees, delta, 0.0), mask=in_rows)
    tl.store(lse2_ptr + rows, tl.where(sees, lse * LOG2E, float("inf")), mask=in_rows)


@triton.jit
def _max_ties_kernel(
    q_ptr,
    k_ptr,
    seq,
    stat_ptrs,
    dstat_ptrs,
    row_ptrs,
    q_strides,
    k_strides,
    row_strides,
    total_q,
    total_k,
    n_heads,
    group,
    n_blocks,
    left,
    right,
    scale2,
    cap_scale,
    Q_STEPS: tl.constexpr,
    K_STEPS: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """For max_logit: the exponent x from which a key attains the maximum, and g / (number of such keys)."""
    _, _, max_ptr = stat_ptrs
    _, _, dmax_ptr = dstat_ptrs
    lse2_ptr, _, _, _, floor_ptr, weight_ptr = row_ptrs
    pid = tl.program_id(0)
    m0 = (n_blocks - 1 - pid % n_blocks) * BLOCK_M
    batch = pid // n_blocks // n_heads
    head = pid // n_blocks % n_heads
    start_q, start_k, len_q, len_k, end_q, end_k, first_key, shift = sequence_bounds(batch, seq, total_q, total_k)
    if m0 >= len_q:
        return

    offs_m = m0 + tl.arange(0, BLOCK_M)
    in_rows = offs_m < len_q
    rows = row_offset(row_strides, batch, head, start_q) + offs_m
    lse2 = tl.load(lse2_ptr + rows, mask=in_rows, other=float("inf"))
    width = hooks.tie_width(tl.load(max_ptr + rows, mask=in_rows, other=0.0))
    q0, q1 = load_rows(
        head_ptr(q_ptr, q_strides, Q_STEPS, batch, head, start_q), m0, end_q, Q_STEPS, BLOCK_M, D0, D1, D, True
    )
    k_ptr = head_ptr(k_ptr, k_strides, K_STEPS, batch, head // group, start_k)
    span = key_blocks(m0, end_q, end_k, first_key, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N)
    ties = tl.zeros([BLOCK_M], tl.float32)
    # its own maximum: one that the forward rounded differently might be attained by no key here
    x_max = ties - float("inf")
    for MASKED in tl.static_range(2):
        for index in range(count_blocks(span, MASKED)):
            n0 = block_start(index, span, BLOCK_N, MASKED)
            k0, k1 = load_rows(k_ptr, n0, end_k, K_STEPS, BLOCK_N, D0, D1, D, MASKED)
            x = cap(dot_rows(q0, q1, k0, k1, D1), cap_scale, HAS_SOFTCAP) * scale2 - lse2[:, None]
            if MASKED:
                offs_n = n0 + tl.arange(0, BLOCK_N)[None, :]
                seen = in_window(offs_n < end_k, offs_m[:, None], offs_n, shift, left, right, HAS_LEFT, HAS_RIGHT)
                x = tl.where(seen, x, float("-inf"))
            x_new = tl.maximum(x_max, tl.max(x, 1))
            hit = (x >= (x_new - width)[:, None]) & (x > float("-inf"))
            ties = tl.where(x_new > x_max + width, 0.0, ties) + tl.sum(hit.to(tl.float32), 1)
            x_max = x_new
    g = tl.load(dmax_ptr + rows, mask=in_rows, other=0.0)
    sees = x_max > float("-inf")
    weight = tl.where(sees, g / tl.maximum(ties, 1.0), 0.0)
    tl.store(floor_ptr + rows, tl.where(sees, x_max - width, float("inf")), mask=in_rows)
    tl.store(weight_ptr + rows, weight, mask=in_rows)
