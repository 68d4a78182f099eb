"""Tile functions that the forward and backward kernels share.

A head dim that is no power of two is two chunks, D0 + D1 (80 = 64 + 16), so that it costs its own size and not the
next power of two. Every tile of q, k, v then is a pair; with D1 = 0 the second one is a dummy that no code uses.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# true fp32 products for fp32 inputs (the default would be tf32); no effect on 16-bit ones
PRECISION: tl.constexpr = tl.constexpr("ieee")


@triton.jit
def head_ptr(ptr, strides, STEPS: tl.constexpr, batch, head, start):
    """First element of a head of a sequence, in 64 bits; strides (batch, head)."""
    stride_b, stride_h = strides
    stride_t: tl.constexpr = STEPS[0]
    return ptr + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + start * stride_t


@triton.jit
def _load_chunk(
    ptr,
    offs,
    n_rows,
    STEPS: tl.constexpr,
    D0: tl.constexpr,
    DC: tl.constexpr,
    D: tl.constexpr,
    MASKED: tl.constexpr,
):
    stride_t: tl.constexpr = STEPS[0]
    stride_d: tl.constexpr = STEPS[1]
    offs_d = D0 + tl.arange(0, DC)
    ptrs = ptr + offs[:, None] * stride_t + offs_d[None, :] * stride_d
    PADDED: tl.constexpr = D0 + DC > D
    if MASKED and PADDED:
        return tl.load(ptrs, mask=(offs[:, None] < n_rows) & (offs_d[None, :] < D), other=0.0)
    elif MASKED:
        return tl.load(ptrs, mask=offs[:, None] < n_rows, other=0.0)
    elif PADDED:
        return tl.load(ptrs, mask=offs_d[None, :] < D, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def load_rows(
    ptr,
    row0,
    n_rows,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """[BLOCK, D0] and [BLOCK, D1] of the rows from row0 on; when MASKED, 0 from row n_rows on.

    Only the start is a 64-bit product: offsets inside a tile fit 32 bits (`launch.narrow` sees to it).
    """
    stride_t: tl.constexpr = STEPS[0]
    offs = tl.arange(0, BLOCK)
    start = ptr + tl.cast(row0, tl.int64) * stride_t
    x0 = _load_chunk(start, offs, n_rows - row0, STEPS, 0, D0, D, MASKED)
    x1 = x0
    if D1 > 0:
        x1 = _load_chunk(start, offs, n_rows - row0, STEPS, D0, D1, D, MASKED)
    return x0, x1


@triton.jit
def _store_chunk(ptr, x, offs, n_rows, STEPS: tl.constexpr, D0: tl.constexpr, DC: tl.constexpr, D: tl.constexpr):
    stride_t: tl.constexpr = STEPS[0]
    stride_d: tl.constexpr = STEPS[1]
    offs_d = D0 + tl.arange(0, DC)
    ptrs = ptr + offs[:, None] * stride_t + offs_d[None, :] * stride_d
    mask = offs[:, None] < n_rows
    if D0 + DC > D:
        mask = mask & (offs_d[None, :] < D)
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_rows(
    ptr,
    x0,
    x1,
    row0,
    n_rows,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    D: tl.constexpr,
):
    """Inverse of `load_rows`; rows from n_rows on are not written."""
    stride_t: tl.constexpr = STEPS[0]
    offs = tl.arange(0, BLOCK)
    start = ptr + tl.cast(row0, tl.int64) * stride_t
    _store_chunk(start, x0, offs, n_rows - row0, STEPS, 0, D0, D)
    if D1 > 0:
        _store_chunk(start, x1, offs, n_rows - row0, STEPS, D0, D1, D)


@triton.jit
def dot_rows(a0, a1, b0, b1, D1: tl.constexpr):
    """[A, D] @ [B, D]^T -> [A, B], fp32. Both operands come from memory: a transposed dot result would meet the
    wrong code that triton < 3.7.1 makes of it on sm_90."""
    t = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
    if D1 > 0:
        t = tl.dot(a1, tl.trans(b1), t, input_precision=PRECISION)
    return t


@triton.jit
def dot_acc(p, x0, x1, acc0, acc1, D1: tl.constexpr):
    """acc += p [A, B] @ x [B, D], p rounded to x's dtype as every flash attention does."""
    p = p.to(x0.dtype)
    acc0 = tl.dot(p, x0, acc0, input_precision=PRECISION)
    if D1 > 0:
        acc1 = tl.dot(p, x1, acc1, input_precision=PRECISION)
    return acc0, acc1


@triton.jit
def cap(t, cap_scale, HAS_SOFTCAP: tl.constexpr):
    """Raw products to t with s * log2(e) = t * scale2: softcap is t = tanh(q.k * scale / softcap)."""
    if HAS_SOFTCAP:
        t = 1.0 - 2.0 / (tl.exp2(t * (cap_scale * (2.0 * LOG2E))) + 1.0)
    return t


@triton.jit
def empty_pair(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """fp32 accumulators of a pair of chunks."""
    acc0 = tl.zeros([ROWS, D0], tl.float32)
    acc1 = acc0
    if D1 > 0:
        acc1 = tl.zeros([ROWS, D1], tl.float32)
    return acc0, acc1


@triton.jit
def zero_rows(x, keep, D1: tl.constexpr):
    """The pair x with 0 in the rows that are not in `keep`, whatever they hold."""
    x0, x1 = x
    x0 = tl.where(keep[:, None], x0, 0.0)
    if D1 > 0:
        x1 = tl.where(keep[:, None], x1, 0.0)
    return x0, x1


@triton.jit
def row_offset(row_strides, batch, head, start):
    """Where a head's rows start in lse, a statistic or delta."""
    stride_b, stride_h = row_strides
    return batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + start
