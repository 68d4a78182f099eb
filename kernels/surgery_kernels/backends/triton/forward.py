"""Forward: out, lse and the statistics in one pass.

Online softmax in base 2. With t = q.k (or tanh, softcapped), s2 = t * scale2 = s * log2(e), m the running maximum:

    p = exp2(s2 - m);  l = l * alpha + sum p;  acc = acc * alpha + p @ v;  alpha = exp2(m_old - m)
    out = acc / l;  lse = (m + log2 l) * ln 2;  sink_mass = (sum of p over the sinks, carried like l) / l
"""

import triton
import triton.language as tl

from . import stat_hooks as hooks
from .blocks import block_start, count_blocks, in_window, key_blocks, sequence_bounds
from .launch import Launch, empty_rows, problem_args
from .tiles import LN2, cap, dot_acc, dot_rows, empty_pair, head_ptr, load_rows, row_offset, store_rows


@triton.jit
def _attend_blocks(
    state,
    q,
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
    SINK_MASS: tl.constexpr,
    ENTROPY: tl.constexpr,
    N_SINKS: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The loop over the full key blocks, or over the masked ones."""
    acc0, acc1, m_i, l_i, sink_i, entropy_i = state
    q0, q1 = q
    k_ptr, v_ptr = kv_ptrs
    shift, left, right = window
    scale2, cap_scale = scales
    sinks_ptr, batch, first_key, sink_low, sink_high = sink_keys
    for index in range(count_blocks(span, MASKED)):
        n0 = block_start(index, span, BLOCK_N, MASKED)
        k0, k1 = load_rows(k_ptr, n0, end_k, K_STEPS, BLOCK_N, D0, D1, D, MASKED)
        # [BLOCK_M, D] @ [D, BLOCK_N] -> [BLOCK_M, BLOCK_N], fp32
        t = cap(dot_rows(q0, q1, k0, k1, D1), cap_scale, HAS_SOFTCAP)
        if MASKED:
            offs_n = n0 + tl.arange(0, BLOCK_N)[None, :]
            offs_m = m0 + tl.arange(0, BLOCK_M)[:, None]
            seen = in_window(offs_n < end_k, offs_m, offs_n, shift, left, right, HAS_LEFT, HAS_RIGHT)
            t = tl.where(seen, t, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(t, 1) * scale2)
        m_safe = m_new
        if MASKED:
            # keep the pivot finite for rows that have seen no key yet, else -inf - (-inf) = nan
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        x = t * scale2 - m_safe[:, None]
        p = tl.exp2(x)
        alpha = tl.exp2(m_i - m_safe)
        if ENTROPY:
            entropy_i = hooks.entropy_update(entropy_i, l_i, m_i, m_safe, alpha, p, x)
        if SINK_MASS:
            sink_i = sink_i * alpha
            if (n0 < sink_high) & (n0 + BLOCK_N > sink_low):
                sink = hooks.is_sink(n0 + tl.arange(0, BLOCK_N), batch, first_key, sinks_ptr, N_SINKS)
                sink_i = hooks.sink_update(sink_i, p, sink)
        l_i = l_i * alpha + tl.sum(p, 1)
        m_i = m_new
        acc0 = acc0 * alpha[:, None]
        if D1 > 0:
            acc1 = acc1 * alpha[:, None]
        v0, v1 = load_rows(v_ptr, n0, end_k, V_STEPS, BLOCK_N, D0, D1, D, MASKED)
        acc0, acc1 = dot_acc(p, v0, v1, acc0, acc1, D1)
    return acc0, acc1, m_i, l_i, sink_i, entropy_i


@triton.jit
def _flash_attn_stats_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    seq,
    sinks_ptr,
    out_ptr,
    lse_ptr,
    stat_ptrs,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
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
    V_STEPS: tl.constexpr,
    OUT_STEPS: tl.constexpr,
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
    sink_ptr, entropy_ptr, max_ptr = stat_ptrs
    SINK_MASS: tl.constexpr = sink_ptr is not None
    ENTROPY: tl.constexpr = entropy_ptr is not None
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
    k_ptr = head_ptr(k_ptr, k_strides, K_STEPS, batch, head // group, start_k)
    v_ptr = head_ptr(v_ptr, v_strides, V_STEPS, batch, head // group, start_k)
    span = key_blocks(m0, end_q, end_k, first_key, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N)
    sink_keys = (sinks_ptr, batch, first_key, 0, 0)
    if SINK_MASS:
        sink_low, sink_high = hooks.sink_range(batch, first_key, sinks_ptr, N_SINKS)
        sink_keys = (sinks_ptr, batch, first_key, sink_low, sink_high)
    acc0, acc1 = empty_pair(BLOCK_M, D0, D1)
    zeros = tl.zeros([BLOCK_M], tl.float32)
    state = (acc0, acc1, zeros - float("inf"), zeros, zeros, zeros)
    for MASKED in tl.static_range(2):
        state = _attend_blocks(
            state,
            q,
            (k_ptr, v_ptr),
            m0,
            end_k,
            span,
            (shift, left, right),
            (scale2, cap_scale),
            sink_keys,
            K_STEPS,
            V_STEPS,
            HAS_LEFT,
            HAS_RIGHT,
            HAS_SOFTCAP,
            SINK_MASS,
            ENTROPY,
            N_SINKS,
            D0,
            D1,
            D,
            BLOCK_M,
            BLOCK_N,
            MASKED,
        )
    acc0, acc1, m_i, l_i, sink_i, entropy_i = state

    offs_m = m0 + tl.arange(0, BLOCK_M)
    sees = (l_i > 0.0) & (offs_m < end_q)
    l_safe = tl.where(sees, l_i, 1.0)
    inv_l = tl.where(sees, 1.0 / l_safe, 0.0)
    out_ptr = head_ptr(out_ptr, out_strides, OUT_STEPS, batch, head, start_q)
    if D1 > 0:
        acc1 = acc1 * inv_l[:, None]
    store_rows(out_ptr, acc0 * inv_l[:, None], acc1, m0, len_q, OUT_STEPS, BLOCK_M, D0, D1, D)
    rows = row_offset(row_strides, batch, head, start_q) + offs_m
    in_rows = offs_m < len_q
    lse = tl.where(sees, (m_i + tl.log2(l_safe)) * LN2, float("-inf"))
    tl.store(lse_ptr + rows, lse, mask=in_rows)
    if SINK_MASS:
        tl.store(sink_ptr + rows, sink_i * inv_l, mask=in_rows)
    if ENTROPY:
        entropy = (tl.log2(l_safe) - entropy_i * inv_l) * LN2
        tl.store(entropy_ptr + rows, tl.where(sees, entropy, 0.0), mask=in_rows)
    if max_ptr is not None:
        tl.store(max_ptr + rows, tl.where(sees, m_i * LN2, 0.0), mask=in_rows)


def forward_launch(inputs, config):
    """The launch of the forward kernel, and what it writes.

    Args:
        inputs: AttnInputs with a positive scale, see `launch.prepare`.
        config: TileConfig.
    Returns:
        Launch, (out, lse, stats).
    """
    out = inputs.q.new_empty(inputs.q.shape)
    lse = empty_rows(inputs)
    stats = empty_rows(inputs, len(inputs.stats))
    pointers = dict(zip(inputs.stats, stats, strict=True))
    args = problem_args(inputs, config, q=inputs.q, k=inputs.k, v=inputs.v, out=out)
    args |= {
        "lse_ptr": lse,
        "stat_ptrs": tuple(pointers.get(name) for name in ("sink_mass", "entropy", "max_logit")),
        "n_blocks": triton.cdiv(inputs.max_seqlen_q, config.block_m),
    }
    return Launch(_flash_attn_stats_fwd_kernel, "fwd", args, config), (out, lse, stats)
