"""Column mass: the attention that each key receives, summed over the query rows of its sequence, per query head.

    column_mass_j = sum_i exp2(s2_ij - lse2_i)

A program owns a block of keys of one query head, as in dkdv.py, and keeps one number a key.
"""

import torch
import triton
import triton.language as tl

from . import stat_hooks as hooks
from .blocks import block_start, count_blocks, in_window, row_blocks, sequence_bounds
from .configs import TileConfig
from .launch import Launch, prepare, problem_args
from .tiles import LOG2E, cap, dot_rows, head_ptr, load_rows, row_offset


@triton.jit
def _column_mass_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    seq,
    mass_ptr,
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
    """One block of keys of one query head against all the rows that see it."""
    pid = tl.program_id(0)
    n0 = pid % n_blocks * BLOCK_N
    batch = pid // n_blocks // n_heads
    head = pid // n_blocks % n_heads
    start_q, start_k, len_q, len_k, end_q, end_k, first_key, shift = sequence_bounds(batch, seq, total_q, total_k)

    k_head = head_ptr(k_ptr, k_strides, K_STEPS, batch, head // group, start_k)
    k0, k1 = load_rows(k_head, n0, end_k, K_STEPS, BLOCK_N, D0, D1, D, True)
    q_head = head_ptr(q_ptr, q_strides, Q_STEPS, batch, head, start_q)
    lse_ptr += row_offset(row_strides, batch, head, start_q)
    span = row_blocks(n0, end_q, end_k, first_key, shift, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N)
    offs_n = n0 + tl.arange(0, BLOCK_N)
    mass = tl.zeros([BLOCK_N], tl.float32)
    for MASKED in tl.static_range(2):
        for index in range(count_blocks(span, MASKED)):
            m0 = block_start(index, span, BLOCK_M, MASKED)
            offs_m = m0 + tl.arange(0, BLOCK_M)
            q0, q1 = load_rows(q_head, m0, end_q, Q_STEPS, BLOCK_M, D0, D1, D, MASKED)
            lse = hooks.load_row(lse_ptr, offs_m, end_q, float("-inf"), MASKED)
            lse2 = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
            x = cap(dot_rows(k0, k1, q0, q1, D1), cap_scale, HAS_SOFTCAP) * scale2 - lse2[None, :]
            if MASKED:
                i = offs_m[None, :]
                seen = in_window(i < end_q, i, offs_n[:, None], shift, left, right, HAS_LEFT, HAS_RIGHT)
                x = tl.where(seen, x, float("-inf"))
            mass += tl.sum(tl.exp2(x), 1)
    real = (offs_n >= first_key) & (offs_n < end_k)
    base = (batch * n_heads + head).to(tl.int64) * total_k
    tl.store(mass_ptr + base + offs_n, tl.where(real, mass, 0.0), mask=offs_n < len_k)


def config_for(head_dim, itemsize, interpreted):
    """TileConfig: one program holds a key block of at most 16 KiB and streams the rows."""
    if interpreted:
        return TileConfig(16, 32, 4, 1)
    block_n = 64 if head_dim * itemsize <= 256 else 32
    return TileConfig(64 if itemsize == 2 else 32, block_n, 4, 2)


def column_mass(inputs, lse):
    """[B, H, Tk] fp32, see `surgery_kernels.column_mass`."""
    inputs, _ = prepare(inputs)
    q, k = inputs.q, inputs.k
    config = config_for(q.shape[-1], q.element_size(), not q.is_cuda)
    mass = q.new_empty((q.shape[0], q.shape[2], k.shape[1]), dtype=torch.float32)
    args = problem_args(inputs, config, q=q, k=k)
    args |= {
        "lse_ptr": lse.float().contiguous(),
        "mass_ptr": mass,
        "n_blocks": triton.cdiv(k.shape[1], config.block_n),
    }
    Launch(_column_mass_kernel, "column_mass", args, config).run()
    return mass
