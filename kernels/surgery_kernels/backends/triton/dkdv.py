"""dk and dv: a program owns a block of keys of one kv head and walks the query rows of every head of its group.

Everything is transposed, so that no dot takes a transposed dot result (wrong code on sm_90 with triton < 3.7.1):

    s^T = k q^T;  p^T = exp2(s2^T - lse2);  dv += p^T dout;  dp^T = v dout^T
    ds^T = p^T (dp^T + dp_stat - delta) + ds_stat;  dk += scale * ds^T q

The sum over a group's heads happens in the accumulators: no atomics, deterministic, nothing to reduce afterwards.

Given `dq_ptr` the kernel is the whole backward in a single pass: dq^T = k^T ds^T of each tile is added to dq in fp32 by
atomics. Two of seven products less, and sums of dq in an order that changes from run to run.
"""

import triton
import triton.language as tl

from . import stat_hooks as hooks
from .blocks import all_masked, block_start, count_blocks, in_window, row_blocks, sequence_bounds
from .tiles import (
    PRECISION,
    cap,
    dot_acc,
    dot_rows,
    empty_pair,
    head_ptr,
    load_rows,
    row_offset,
    store_rows,
    zero_rows,
)


@triton.jit
def _add_chunk(ptr, k, ds, n_rows, STEPS: tl.constexpr, D0: tl.constexpr, DC: tl.constexpr, D: tl.constexpr):
    """Atomically add (ds^T k) [BLOCK_M, DC] to the fp32 rows at ptr, n_rows of them real; ds [BLOCK_N, BLOCK_M]."""
    # not ds^T k: a transposed dot result must not meet a dot (wrong code on sm_90 with triton < 3.7.1)
    dq = tl.dot(tl.trans(k), ds.to(k.dtype), input_precision=PRECISION)
    offs_m = tl.arange(0, ds.shape[1])[None, :]
    offs_d = D0 + tl.arange(0, DC)[:, None]
    tl.atomic_add(ptr + offs_m * STEPS[0] + offs_d * STEPS[1], dq, mask=(offs_d < D) & (offs_m < n_rows), sem="relaxed")


@triton.jit
def _dkdv_blocks(
    state,
    k,
    v,
    ptrs,
    row_ptrs,
    heads,
    n0,
    end_q,
    span,
    window,
    scales,
    sink,
    real,
    Q_STEPS: tl.constexpr,
    DOUT_STEPS: tl.constexpr,
    DQ_STEPS: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_DOUT: tl.constexpr,
    HAS_DQ: tl.constexpr,
    SINK_MASS: tl.constexpr,
    ENTROPY: tl.constexpr,
    MAX_LOGIT: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The loop over the full row blocks of every head, or over the masked ones."""
    dk0, dk1, dv0, dv1 = state
    k0, k1 = k
    v0, v1 = v
    q_ptr, dout_ptr, dq_ptr = ptrs
    lse2_ptr, delta_ptr, sink_g_ptr, entropy_g_ptr, floor_ptr, weight_ptr = row_ptrs
    shift, left, right = window
    scale2, cap_scale = scales
    n_blocks = count_blocks(span, MASKED)
    heads_each, q_stride_h, dout_stride_h, dq_stride_h, row_stride_h = heads
    # one loop over the blocks of every head: the pipeline fills once
    per_head = tl.maximum(n_blocks, 1)
    for index in range(n_blocks * heads_each):
        member = index // per_head
        m0 = block_start(index - member * per_head, span, BLOCK_M, MASKED)
        rows = member.to(tl.int64) * row_stride_h
        q0, q1 = load_rows(q_ptr + member.to(tl.int64) * q_stride_h, m0, end_q, Q_STEPS, BLOCK_M, D0, D1, D, MASKED)
        offs_m = m0 + tl.arange(0, BLOCK_M)
        lse2 = hooks.load_row(lse2_ptr + rows, offs_m, end_q, float("inf"), MASKED)
        # [BLOCK_N, D] @ [D, BLOCK_M] -> [BLOCK_N, BLOCK_M], fp32
        t = cap(dot_rows(k0, k1, q0, q1, D1), cap_scale, HAS_SOFTCAP)
        x = t * scale2 - lse2[None, :]
        if MASKED:
            offs_n = n0 + tl.arange(0, BLOCK_N)[:, None]
            i = offs_m[None, :]
            seen = i < end_q
            if HAS_DQ:
                seen = seen & real[:, None]
            seen = in_window(seen, i, offs_n, shift, left, right, HAS_LEFT, HAS_RIGHT)
            x = tl.where(seen, x, float("-inf"))
        p = tl.exp2(x)
        dp = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        if HAS_DOUT:
            do0, do1 = load_rows(
                dout_ptr + member.to(tl.int64) * dout_stride_h, m0, end_q, DOUT_STEPS, BLOCK_M, D0, D1, D, MASKED
            )
            dv0, dv1 = dot_acc(p, do0, do1, dv0, dv1, D1)
            dp = dot_rows(v0, v1, do0, do1, D1)
        if SINK_MASS and MASKED:
            sink_g = hooks.load_row(sink_g_ptr + rows, offs_m, end_q, 0.0, MASKED)
            dp = hooks.sink_dp(dp, sink_g[None, :], sink[:, None])
        entropy_g, floor, weight = lse2, lse2, lse2
        if ENTROPY:
            entropy_g = hooks.load_row(entropy_g_ptr + rows, offs_m, end_q, 0.0, MASKED)
        if MAX_LOGIT:
            floor = hooks.load_row(floor_ptr + rows, offs_m, end_q, float("inf"), MASKED)
            weight = hooks.load_row(weight_ptr + rows, offs_m, end_q, 0.0, MASKED)
        delta = hooks.load_row(delta_ptr + rows, offs_m, end_q, 0.0, MASKED)
        ds = hooks.score_gradient(
            dp,
            p,
            x,
            t,
            delta[None, :],
            entropy_g[None, :],
            floor[None, :],
            weight[None, :],
            ENTROPY,
            MAX_LOGIT,
            HAS_SOFTCAP,
        )
        dk0, dk1 = dot_acc(ds, q0, q1, dk0, dk1, D1)
        if HAS_DQ:
            dq_rows = dq_ptr + member.to(tl.int64) * dq_stride_h + tl.cast(m0, tl.int64) * DQ_STEPS[0]
            _add_chunk(dq_rows, k0, ds, end_q - m0, DQ_STEPS, 0, D0, D)
            if D1 > 0:
                _add_chunk(dq_rows, k1, ds, end_q - m0, DQ_STEPS, D0, D1, D)
    return dk0, dk1, dv0, dv1


@triton.jit
def _bwd_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    seq,
    sinks_ptr,
    row_ptrs,
    dk_ptr,
    dv_ptr,
    dq_ptr,
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    dk_strides,
    dv_strides,
    dq_strides,
    row_strides,
    total_q,
    total_k,
    n_out_heads,
    heads_each,
    group,
    n_blocks,
    left,
    right,
    scale,
    scale2,
    cap_scale,
    Q_STEPS: tl.constexpr,
    K_STEPS: tl.constexpr,
    V_STEPS: tl.constexpr,
    DOUT_STEPS: tl.constexpr,
    DK_STEPS: tl.constexpr,
    DV_STEPS: tl.constexpr,
    DQ_STEPS: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    N_SINKS: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One block of keys against the rows of `heads_each` query heads that see it."""
    lse2_ptr, delta_ptr, sink_g_ptr, entropy_g_ptr, floor_ptr, weight_ptr = row_ptrs
    SINK_MASS: tl.constexpr = sink_g_ptr is not None
    ENTROPY: tl.constexpr = entropy_g_ptr is not None
    MAX_LOGIT: tl.constexpr = floor_ptr is not None
    HAS_DOUT: tl.constexpr = dout_ptr is not None
    HAS_DQ: tl.constexpr = dq_ptr is not None
    pid = tl.program_id(0)
    n0 = pid % n_blocks * BLOCK_N
    batch = pid // n_blocks // n_out_heads
    out_head = pid // n_blocks % n_out_heads
    kv_head = out_head * heads_each // group
    start_q, start_k, len_q, len_k, end_q, end_k, first_key, shift = sequence_bounds(batch, seq, total_q, total_k)
    if n0 >= len_k:
        return

    k = load_rows(
        head_ptr(k_ptr, k_strides, K_STEPS, batch, kv_head, start_k), n0, end_k, K_STEPS, BLOCK_N, D0, D1, D, True
    )
    v = k
    if HAS_DOUT:
        v = load_rows(
            head_ptr(v_ptr, v_strides, V_STEPS, batch, kv_head, start_k),
            n0,
            end_k,
            V_STEPS,
            BLOCK_N,
            D0,
            D1,
            D,
            True,
        )
    offs_n = n0 + tl.arange(0, BLOCK_N)
    real = (offs_n >= first_key) & (offs_n < end_k)
    span = row_blocks(n0, end_q, end_k, first_key, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N)
    sink = offs_n < 0
    masked = n0 < 0
    if SINK_MASS:
        sink_low, sink_high = hooks.sink_range(batch, first_key, sinks_ptr, N_SINKS)
        sink = hooks.is_sink(offs_n, batch, first_key, sinks_ptr, N_SINKS)
        # a block with a sink key takes all its rows through the masked loop, the only one that knows of the statistic
        # (a branch in the loop would give dp another layout on mma.sync, and cost registers everywhere)
        masked = (n0 < sink_high) & (n0 + BLOCK_N > sink_low)
    if HAS_DQ:
        # dq sums over keys: what padded ones hold, nan too, must not meet a product
        k = zero_rows(k, real, D1)
        v = zero_rows(v, real, D1)
        masked = masked | (n0 < first_key) | (n0 + BLOCK_N > end_k)
    if SINK_MASS or HAS_DQ:
        span = all_masked(span, masked)
    dk0, dk1 = empty_pair(BLOCK_N, D0, D1)
    dv0, dv1 = empty_pair(BLOCK_N, D0, D1)
    state = (dk0, dk1, dv0, dv1)
    head = out_head * heads_each
    q_head = head_ptr(q_ptr, q_strides, Q_STEPS, batch, head, start_q)
    dout_head, dq_head = q_head, q_head
    dout_stride_h, dq_stride_h = q_strides[1], q_strides[1]
    if HAS_DOUT:
        dout_head = head_ptr(dout_ptr, dout_strides, DOUT_STEPS, batch, head, start_q)
        dout_stride_h = dout_strides[1]
    if HAS_DQ:
        dq_head = head_ptr(dq_ptr, dq_strides, DQ_STEPS, batch, head, start_q)
        dq_stride_h = dq_strides[1]
    head_rows = hooks.shift_rows(row_ptrs, row_offset(row_strides, batch, head, start_q))
    # the masked loop first: fewer registers than the other way round
    for MASKED in tl.static_range(1, -1, -1):
        state = _dkdv_blocks(
            state,
            k,
            v,
            (q_head, dout_head, dq_head),
            head_rows,
            (heads_each, q_strides[1], dout_stride_h, dq_stride_h, row_strides[1]),
            n0,
            end_q,
            span,
            (shift, left, right),
            (scale2, cap_scale),
            sink,
            real,
            Q_STEPS,
            DOUT_STEPS,
            DQ_STEPS,
            HAS_LEFT,
            HAS_RIGHT,
            HAS_SOFTCAP,
            HAS_DOUT,
            HAS_DQ,
            SINK_MASS,
            ENTROPY,
            MAX_LOGIT,
            D0,
            D1,
            D,
            BLOCK_M,
            BLOCK_N,
            MASKED,
        )
    dk0, dk1, dv0, dv1 = state

    # what a padded key collected is dropped; it may be anything, nan too
    dk0, dk1 = zero_rows((dk0 * scale, dk1 * scale), real, D1)
    dv0, dv1 = zero_rows((dv0, dv1), real, D1)
    dk_head = head_ptr(dk_ptr, dk_strides, DK_STEPS, batch, out_head, start_k)
    dv_head = head_ptr(dv_ptr, dv_strides, DV_STEPS, batch, out_head, start_k)
    store_rows(dk_head, dk0, dk1, n0, len_k, DK_STEPS, BLOCK_N, D0, D1, D)
    store_rows(dv_head, dv0, dv1, n0, len_k, DV_STEPS, BLOCK_N, D0, D1, D)
