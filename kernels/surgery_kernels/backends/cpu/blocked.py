"""Any feature and any statistic in O(T) memory: blocks of query rows against the keys that they can see.

One block's scores [B, H, rows, keys] are alive at a time; the backward computes them again.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...stats import STATS
from ..sink_epilogue import sink_keys
from ..sink_epilogue.bounds import bounds_of, visible_keys

BLOCK = 256
# scores of a tile, all heads together: 32 MiB in fp32
MAX_SCORES = 2**23


class Tile(NamedTuple):
    """A block of query rows: `rows` and `keys` are slices, s [B, H, rows, keys] scores, -inf where invisible."""

    rows: slice
    keys: slice
    q: Tensor
    k: Tensor
    v: Tensor
    s: Tensor
    is_sink: Tensor


def _work_dtype(inputs):
    # a low-precision matmul would round the scores, and with them lse and every statistic
    return inputs.rows_dtype


def _key_range(inputs, bounds, start, stop):
    """The keys that any row of [start, stop) of any sequence may see."""
    left, right = inputs.window_bounds
    low, high = int(bounds.first_key.min()), int(bounds.used_k.max())
    offset = bounds.used_k - bounds.used_q
    if right >= 0:
        high = min(high, int(offset.max()) + stop + right)
    if left >= 0:
        low = max(low, int(offset.min()) + start - left)
    return slice(min(max(low, 0), inputs.k.shape[1]), max(min(high, inputs.k.shape[1]), 0))


def _tiles(inputs):
    """Yield the tiles of a dense problem from the first row to the last; rows without any key yield none."""
    if 0 in inputs.q.shape:
        return
    bounds = bounds_of(inputs)
    dtype = _work_dtype(inputs)
    len_q, n_heads, n_kv = inputs.q.shape[1], inputs.q.shape[2], inputs.k.shape[2]
    q, k, v = (x.transpose(1, 2).to(dtype) for x in (inputs.q, inputs.k, inputs.v))
    is_sink = torch.zeros(inputs.k.shape[:2], dtype=inputs.rows_dtype)
    if is_sink.numel():
        found = sink_keys(inputs, bounds.first_key, bounds.used_k)
        is_sink.scatter_add_(1, found.index, found.valid.to(is_sink.dtype))
    block = max(1, min(BLOCK, MAX_SCORES // max(1, q.shape[0] * n_heads * k.shape[2])))
    for start in range(0, len_q, block):
        rows = slice(start, min(start + block, len_q))
        keys = _key_range(inputs, bounds, rows.start, rows.stop)
        if keys.stop <= keys.start:
            continue
        # [B, H_kv, G * rows, D] @ [B, H_kv, D, keys]: the heads of a group share one product, k is not repeated
        q_tile = q[:, :, rows].unflatten(1, (n_kv, -1)).flatten(2, 3)
        k_tile, v_tile = k[:, :, keys], v[:, :, keys]
        s = torch.matmul(q_tile, k_tile.transpose(-1, -2)).to(inputs.rows_dtype).mul_(inputs.softmax_scale)
        s = s.view(s.shape[0], n_heads, rows.stop - rows.start, -1)
        if inputs.softcap:
            s = s.div_(inputs.softcap).tanh_().mul_(inputs.softcap)
        visible = visible_keys(inputs, bounds, torch.arange(rows.start, rows.stop), torch.arange(keys.start, keys.stop))
        s.masked_fill_(~visible[:, None], float("-inf"))
        yield Tile(rows, keys, q_tile, k_tile, v_tile, s, is_sink[:, None, None, keys])


def forward(inputs):
    q = inputs.q
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full(inputs.rows_shape, float("-inf"), dtype=inputs.rows_dtype)
    stats = lse.new_zeros(len(inputs.stats), *lse.shape)
    for tile in _tiles(inputs):
        lse_tile = torch.logsumexp(tile.s, -1)
        blind = lse_tile == float("-inf")
        p = torch.exp(tile.s - lse_tile.masked_fill(blind, 0.0).unsqueeze(-1))
        grouped = p.to(tile.v.dtype).view(*tile.q.shape[:-1], -1)
        out_tile = torch.matmul(grouped, tile.v).view(*lse_tile.shape, -1)
        out[:, tile.rows] = out_tile.transpose(1, 2).to(out.dtype)
        lse[:, :, tile.rows] = lse_tile
        for row, name in zip(stats, inputs.stats, strict=True):
            value = STATS[name].value(tile.s, p, lse_tile, tile.is_sink)
            row[:, :, tile.rows] = value.masked_fill(blind, 0.0)
    return out, lse, stats


def backward(inputs, out, lse, stats, dout, dlse, dstats):
    dtype = _work_dtype(inputs)
    dq = torch.zeros_like(inputs.q, memory_format=torch.contiguous_format)
    # fp32 sums over the blocks; [B, H_kv, Tk, D]
    dk, dv = (torch.zeros(x.transpose(1, 2).shape, dtype=inputs.rows_dtype) for x in (inputs.k, inputs.v))
    for tile in _tiles(inputs):
        rows, keys = tile.rows, tile.keys
        blind = lse[:, :, rows] == float("-inf")
        lse_tile = lse[:, :, rows].masked_fill(blind, 0.0)
        p = torch.exp(tile.s - lse_tile.unsqueeze(-1))
        delta = torch.zeros_like(lse_tile)
        dp = torch.zeros_like(tile.s)
        if dout is not None:
            # do [B, H, rows, D]; grouped as q
            do = dout[:, rows].transpose(1, 2)
            delta = (do.to(delta.dtype) * out[:, rows].transpose(1, 2).to(delta.dtype)).sum(-1)
            do = do.to(dtype).reshape(tile.q.shape)
            dp = torch.matmul(do, tile.v.transpose(-1, -2)).to(delta.dtype).view_as(tile.s)
            p_low = p.to(dtype).view(*tile.q.shape[:-1], -1)
            dv[:, :, keys] += torch.matmul(p_low.transpose(-1, -2), do)
        if dlse is not None:
            delta = delta - dlse[:, :, rows]
        ds_stat = None
        for index, name in enumerate(inputs.stats if dstats is not None else ()):
            stat, value = STATS[name], stats[index][:, :, rows]
            g = dstats[index][:, :, rows].masked_fill(blind, 0.0)
            if stat.dp:
                dp = dp + stat.dp(g, tile.s, lse_tile, tile.is_sink)
            if stat.ddelta:
                delta = delta + stat.ddelta(g, value)
            if stat.ds:
                term = stat.ds(g, tile.s, value)
                ds_stat = term if ds_stat is None else ds_stat + term
        ds = p.mul_(dp.sub_(delta.masked_fill(blind, 0.0).unsqueeze(-1)))
        if ds_stat is not None:
            ds = ds.add_(ds_stat)
        if inputs.softcap:
            s = tile.s.masked_fill_(tile.s == float("-inf"), 0.0)
            ds = ds.mul_(1 - (s / inputs.softcap) ** 2)
        ds = ds.mul_(inputs.softmax_scale).to(dtype).view(*tile.q.shape[:-1], -1)
        dq_tile = torch.matmul(ds, tile.k).view(*lse_tile.shape, -1)
        dq[:, rows] = dq_tile.transpose(1, 2).to(dq.dtype)
        dk[:, :, keys] += torch.matmul(ds.transpose(-1, -2), tile.q)
    return (
        dq,
        dk.transpose(1, 2).to(inputs.k.dtype).contiguous(),
        dv.transpose(1, 2).to(inputs.v.dtype).contiguous(),
    )
