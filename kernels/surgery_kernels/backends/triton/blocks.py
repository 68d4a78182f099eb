"""Which rows and keys a program works on: sequence bounds, and the blocks that need a mask.

Row i of a sequence stands at key position i + shift, shift = used_k - used_q, and sees key j iff

    max(first_key, i + shift - left) <= j <= min(end_k - 1, i + shift + right)

A program walks one axis in two loops over one body: blocks in which every pair is visible, and masked blocks, at the
two ends and where `with_masked` puts some. Neither loop touches a block that nobody sees. A span is

    (low, n_head, full, n_full, tail, n_tail, middle, n_middle)

first row or key and number of blocks of the masked head, of the full part and of the masked tail; of the full part the
`n_middle` blocks from the `middle`-th on are masked too.
"""

import triton
import triton.language as tl


@triton.jit
def sequence_bounds(batch, seq, total_q, total_k):
    """Bounds of one sequence, read on the device.

    Args:
        batch: its index.
        seq: pointers (cu_seqlens_q, cu_seqlens_k, leftpad_k, seqused_q, seqused_k), each may be None.
        total_q, total_k: Tq and Tk, or total_q and total_k of packed inputs.
    Returns:
        start_q, start_k int64 first row and key in memory (0 when dense); len_q, len_k rows that exist;
        end_q, end_k ends of the real ones; first_key; shift.
    """
    cu_q_ptr, cu_k_ptr, leftpad_ptr, used_q_ptr, used_k_ptr = seq
    start_q = tl.zeros([], tl.int64)
    start_k = tl.zeros([], tl.int64)
    len_q = total_q
    len_k = total_k
    # clamped: a wrong offset must not read another tensor's memory
    if cu_q_ptr is not None:
        begin = tl.minimum(tl.maximum(tl.load(cu_q_ptr + batch), 0), total_q)
        len_q = tl.minimum(tl.maximum(tl.load(cu_q_ptr + batch + 1), begin), total_q) - begin
        start_q += begin
    if cu_k_ptr is not None:
        begin = tl.minimum(tl.maximum(tl.load(cu_k_ptr + batch), 0), total_k)
        len_k = tl.minimum(tl.maximum(tl.load(cu_k_ptr + batch + 1), begin), total_k) - begin
        start_k += begin
    used_q = len_q
    used_k = len_k
    first_key = 0
    if leftpad_ptr is not None:
        first_key = tl.maximum(tl.load(leftpad_ptr + batch), 0)
    if used_q_ptr is not None:
        used_q = tl.load(used_q_ptr + batch)
    if used_k_ptr is not None:
        used_k = tl.load(used_k_ptr + batch)
    end_q = tl.minimum(used_q, len_q)
    end_k = tl.minimum(used_k, len_k)
    return start_q, start_k, len_q, len_k, end_q, end_k, first_key, used_k - used_q


@triton.jit
def _split(low, full_low, full_high, high, BLOCK: tl.constexpr):
    """Cut [low, high) into masked, full and masked blocks, the full ones inside [full_low, full_high)."""
    n_head = tl.cdiv(tl.maximum(tl.minimum(full_low, high) - low, 0), BLOCK)
    full = low + n_head * BLOCK
    n_full = tl.maximum(tl.minimum(full_high, high) - full, 0) // BLOCK
    tail = full + n_full * BLOCK
    n_tail = tl.cdiv(tl.maximum(high - tail, 0), BLOCK)
    return low, n_head, full, n_full, tail, n_tail, 0, 0


@triton.jit
def with_masked(span, start, end, BLOCK: tl.constexpr):
    """A span of `_split` with every block that meets [start, end) masked: the loop over full blocks need not know,
    say, of sinks then."""
    low, n_head, full, n_full, tail, n_tail, _, _ = span
    middle = tl.minimum((tl.maximum(start, full) - full) // BLOCK, n_full)
    stop = tl.minimum(tl.cdiv(tl.maximum(end, full) - full, BLOCK), n_full)
    return low, n_head, full, n_full, tail, n_tail, middle, tl.maximum(stop - middle, 0)


@triton.jit
def all_masked(span, condition):
    """A span of `_split` with every block masked where `condition` holds; cheaper than `with_masked`."""
    low, n_head, full, n_full, tail, n_tail, _, _ = span
    # the full blocks follow the head's without a gap
    moved = tl.where(condition, n_full, 0)
    return low, n_head + moved, full, n_full - moved, tail, n_tail, 0, 0


@triton.jit
def count_blocks(span, MASKED: tl.constexpr):
    """Number of masked (or full) blocks of a span."""
    _, n_head, _, n_full, _, n_tail, _, n_middle = span
    if MASKED:
        return n_head + n_middle + n_tail
    else:
        return n_full - n_middle


@triton.jit
def block_start(index, span, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """First row or key of the index-th masked (or full) block."""
    low, n_head, full, _, tail, _, middle, n_middle = span
    if MASKED:
        inner = index - n_head
        start = tl.where(inner < n_middle, full + (middle + inner) * BLOCK, tail + (inner - n_middle) * BLOCK)
        return tl.where(inner < 0, low + index * BLOCK, start)
    else:
        return full + tl.where(index < middle, index, index + n_middle) * BLOCK


@triton.jit
def key_blocks(
    m0,
    end_q,
    end_k,
    first_key,
    shift,
    left,
    right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The key blocks of the rows [m0, m0 + BLOCK_M), see `_split`."""
    last = tl.minimum(m0 + BLOCK_M, end_q) - 1
    low = first_key
    full_low = first_key
    high = tl.where(m0 < end_q, end_k, first_key)
    full_high = end_k
    if HAS_LEFT:
        low = tl.maximum(low, m0 + shift - left)
        full_low = tl.maximum(full_low, last + shift - left)
    if HAS_RIGHT:
        high = tl.minimum(high, last + shift + right + 1)
        full_high = tl.minimum(full_high, m0 + shift + right + 1)
    return _split(low, full_low, full_high, high, BLOCK_N)


@triton.jit
def row_blocks(
    n0,
    end_q,
    end_k,
    first_key,
    shift,
    left,
    right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The row blocks of the keys [n0, n0 + BLOCK_N), see `_split`.

    Keys outside [first_key, end_k) do not make a block masked: what they get is dropped when it is stored.
    """
    low = tl.zeros([], tl.int32)
    full_low = low
    high = tl.where((n0 < end_k) & (n0 + BLOCK_N > first_key), end_q, 0)
    full_high = end_q
    if HAS_RIGHT:
        # rows before the first key's see nothing; what they hold (nan, say) must not meet a product
        low = tl.maximum(low, tl.maximum(n0, first_key) - right - shift)
        full_low = tl.maximum(full_low, n0 + BLOCK_N - 1 - right - shift)
    if HAS_LEFT:
        high = tl.minimum(high, n0 + BLOCK_N + left - shift)
        full_high = tl.minimum(full_high, n0 + left - shift + 1)
    return _split(low, full_low, full_high, high, BLOCK_M)


@triton.jit
def in_window(seen, offs_m, offs_n, shift, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """`seen` and the window's condition; offs_m and offs_n broadcast against each other."""
    if HAS_RIGHT:
        seen = seen & (offs_n <= offs_m + (shift + right))
    if HAS_LEFT:
        seen = seen & (offs_n >= offs_m + (shift - left))
    return seen
