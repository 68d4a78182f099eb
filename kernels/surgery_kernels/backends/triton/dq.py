"""dq: a program owns a block of query rows of one head and walks the keys that they see.

s = q k^T;  p = exp2(s2 - lse2);  dp = dout v^T
ds = p (dp + dp_stat - delta) + ds_stat;  dq += scale * ds k
"""

import triton
import triton.language as tl

from . import stat_hooks as hooks
from .blocks import block_start, count_blocks, in_window, key_blocks, sequence_bounds, with_masked
from .tiles import cap, dot_acc, dot_rows, empty_pair, head_ptr, load_rows, row_offset, store_rows, zero_rows


@triton.jit
def _dq_blocks(
    state,
    q,
    do,
    rows,
    kv_ptrs,
    m0,
    end_k,
    span,
    window,
    scales,
    sink_keys,
    K_STEPS: tl.constexpr,
    V_STEPS: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_DOUT: tl.constexpr,
    SINK_MASS: tl.constexpr,
    ENTROPY: tl.constexpr,
    MAX_LOGIT: tl.constexpr,
    N_SINKS: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The loop over the full key blocks, or over the masked ones."""
    dq0, dq1 = state
    q0, q1 = q
    do0, do1 = do
    lse2, delta, sink_g, entropy_g, floor, weight = rows
    k_ptr, v_ptr = kv_ptrs
    shift, left, right = window
    scale2, cap_scale = scales
    sinks_ptr, batch, first_key = sink_keys
    for index in range(count_blocks(span, MASKED)):
        n0 = block_start(index, span, BLOCK_N, MASKED)
        k0, k1 = load_rows(k_ptr, n0, end_k, K_STEPS, BLOCK_N, D0, D1, D, MASKED)
        t = cap(dot_rows(q0, q1, k0, k1, D1), cap_scale, HAS_SOFTCAP)
        x = t * scale2 - lse2[:, None]
        if MASKED:
            offs_n = n0 + tl.arange(0, BLOCK_N)[None, :]
            offs_m = m0 + tl.arange(0, BLOCK_M)[:, None]
            seen = in_window(offs_n < end_k, offs_m, offs_n, shift, left, right, HAS_LEFT, HAS_RIGHT)
            x = tl.where(seen, x, float("-inf"))
        p = tl.exp2(x)
        dp = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if HAS_DOUT:
            v0, v1 = load_rows(v_ptr, n0, end_k, V_STEPS, BLOCK_N, D0, D1, D, MASKED)
            dp = dot_rows(do0, do1, v0, v1, D1)
        if SINK_MASS and MASKED:
            sink = hooks.is_sink(n0 + tl.arange(0, BLOCK_N), batch, first_key, sinks_ptr, N_SINKS)
            dp = hooks.sink_dp(dp, sink_g[:, None], sink[None, :])
        ds = hooks.score_gradient(
            dp,
            p,
            x,
            t,
            delta[:, None],
            entropy_g[:, None],
            floor[:, None],
            weight[:, None],
            ENTROPY,
            MAX_LOGIT,
            HAS_SOFTCAP,
        )
        dq0, dq1 = dot_acc(ds, k0, k1, dq0, dq1, D1)
    return dq0, dq1


@triton.jit
def _bwd_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    seq,
    sinks_ptr,
    row_ptrs,
    dq_ptr,
    q_strides,
    k_strides,
    v_strides,
    dout_strides,
    dq_strides,
    row_strides,
    total_q,
    total_k,
    n_heads,
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
    """One block of query rows of one head against all the keys that it sees."""
    lse2_ptr, delta_ptr, sink_g_ptr, entropy_g_ptr, floor_ptr, weight_ptr = row_ptrs
    SINK_MASS: tl.constexpr = sink_g_ptr is not None
    ENTROPY: tl.constexpr = entropy_g_ptr is not None
    MAX_LOGIT: tl.constexpr = floor_ptr is not None
    HAS_DOUT: tl.constexpr = dout_ptr is not None
    pid = tl.program_id(0)
    # the last rows see most keys under a causal mask: start them first
    m0 = (n_blocks - 1 - pid % n_blocks) * BLOCK_M
    batch = pid // n_blocks // n_heads
    head = pid // n_blocks % n_heads
    start_q, start_k, len_q, len_k, end_q, end_k, first_key, shift = sequence_bounds(batch, seq, total_q, total_k)
    if m0 >= len_q:
        return

    q = load_rows(
        head_ptr(q_ptr, q_strides, Q_STEPS, batch, head, start_q), m0, end_q, Q_STEPS, BLOCK_M, D0, D1, D, True
    )
    do = q
    if HAS_DOUT:
        do_head = head_ptr(dout_ptr, dout_strides, DOUT_STEPS, batch, head, start_q)
        do = load_rows(do_head, m0, end_q, DOUT_STEPS, BLOCK_M, D0, D1, D, True)
    offs_m = m0 + tl.arange(0, BLOCK_M)
    base = row_offset(row_strides, batch, head, start_q)
    lse2 = hooks.load_row(lse2_ptr + base, offs_m, end_q, float("inf"), True)
    delta = hooks.load_row(delta_ptr + base, offs_m, end_q, 0.0, True)
    sink_g, entropy_g, floor, weight = delta, delta, delta, delta
    span = key_blocks(m0, end_q, end_k, first_key, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N)
    if SINK_MASS:
        sink_g = hooks.load_row(sink_g_ptr + base, offs_m, end_q, 0.0, True)
        # the tiles that hold a sink go with the masked ones: the loop over the full ones has no trace of them
        sink_low, sink_high = hooks.sink_range(batch, first_key, sinks_ptr, N_SINKS)
        span = with_masked(span, sink_low, sink_high, BLOCK_N)
    if ENTROPY:
        entropy_g = hooks.load_row(entropy_g_ptr + base, offs_m, end_q, 0.0, True)
    if MAX_LOGIT:
        floor = hooks.load_row(floor_ptr + base, offs_m, end_q, float("inf"), True)
        weight = hooks.load_row(weight_ptr + base, offs_m, end_q, 0.0, True)
    k_ptr = head_ptr(k_ptr, k_strides, K_STEPS, batch, head // group, start_k)
    v_ptr = head_ptr(v_ptr, v_strides, V_STEPS, batch, head // group, start_k)
    state = empty_pair(BLOCK_M, D0, D1)
    for MASKED in tl.static_range(2):
        state = _dq_blocks(
            state,
            q,
            do,
            (lse2, delta, sink_g, entropy_g, floor, weight),
            (k_ptr, v_ptr),
            m0,
            end_k,
            span,
            (shift, left, right),
            (scale2, cap_scale),
            (sinks_ptr, batch, first_key),
            K_STEPS,
            V_STEPS,
            HAS_LEFT,
            HAS_RIGHT,
            HAS_SOFTCAP,
            HAS_DOUT,
            SINK_MASS,
            ENTROPY,
            MAX_LOGIT,
            N_SINKS,
            D0,
            D1,
            D,
            BLOCK_M,
            BLOCK_N,
            MASKED,
        )
    dq0, dq1 = state
    # a row that sees no key gets 0 whatever its dout is, nan too
    dq0, dq1 = zero_rows((dq0 * scale, dq1 * scale), lse2 < float("inf"), D1)
    dq_head = head_ptr(dq_ptr, dq_strides, DQ_STEPS, batch, head, start_q)
    store_rows(dq_head, dq0, dq1, m0, len_q, DQ_STEPS, BLOCK_M, D0, D1, D)
