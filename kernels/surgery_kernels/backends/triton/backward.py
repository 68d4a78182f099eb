"""Launches of the backward: preprocess, then dk and dv, then dq (each deterministic, none with atomics); or all three
gradients in a single pass that adds dq up by atomics."""

import torch
import triton

from .configs import TileConfig
from .dkdv import _bwd_dkdv_kernel
from .dq import _bwd_dq_kernel
from .launch import Launch, empty_rows, problem_args
from .preprocess import _max_ties_kernel, _preprocess_kernel

STAT_NAMES = ("sink_mass", "entropy", "max_logit")
PREPROCESS = TileConfig(64, 64, 4, 1)


def _stat_pointers(inputs, stats):
    rows = {} if stats is None else dict(zip(inputs.stats, stats, strict=True))
    return tuple(rows.get(name) for name in STAT_NAMES)


def row_buffers(inputs, dstats):
    """The rows that the preprocess step writes, in the order of the kernels' `row_ptrs`; None where unused."""
    dsink, dentropy, dmax = _stat_pointers(inputs, dstats)
    wanted = (True, True, dsink is not None, dentropy is not None, dmax is not None, dmax is not None)
    rows = iter(empty_rows(inputs, sum(wanted)))
    return tuple(next(rows) if want else None for want in wanted)


def preprocess_launches(inputs, out, lse, stats, dout, dlse, dstats, rows, config):
    """The launches that fill `rows` (see `row_buffers`).

    Args:
        config: TileConfig of the tie count, which max_logit's gradient needs.
    """
    pointers = {
        "lse_ptr": lse,
        "dlse_ptr": dlse,
        "stat_ptrs": _stat_pointers(inputs, stats),
        "dstat_ptrs": _stat_pointers(inputs, dstats),
        "row_ptrs": rows,
    }
    args = problem_args(inputs, PREPROCESS, out=out, dout=dout) | pointers
    args["n_blocks"] = triton.cdiv(inputs.max_seqlen_q, PREPROCESS.block_m)
    launches = [Launch(_preprocess_kernel, "preprocess", args, PREPROCESS)]
    if rows[4] is not None:
        args = problem_args(inputs, config, q=inputs.q, k=inputs.k) | pointers
        args["n_blocks"] = triton.cdiv(inputs.max_seqlen_q, config.block_m)
        launches.append(Launch(_max_ties_kernel, "max_ties", args, config))
    return launches


def dkdv_launch(inputs, dout, rows, config, splits=1, dq=None):
    """The launch of the dk/dv kernel, and what it writes.

    Args:
        dq: fp32 zeros shaped as q: the kernel then adds dq / softmax_scale to it, in no fixed order.
        splits: programs a group of query heads: 1 sums the group inside, `group` gives each head its own dk and dv
            (more programs for a short sequence), [B, Tk, H_kv * splits, D] fp32, to be summed by the caller.
    """
    k, v = inputs.k, inputs.v
    group = inputs.q.shape[-2] // k.shape[-2]
    if splits == 1:
        dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    else:
        shape = (*k.shape[:-2], k.shape[-2] * splits, k.shape[-1])
        dk, dv = (x.new_empty(shape, dtype=torch.float32) for x in (k, v))
    args = problem_args(inputs, config, q=inputs.q, k=k, v=v, dout=dout, dk=dk, dv=dv, dq=dq)
    args |= {
        "row_ptrs": rows,
        "n_out_heads": k.shape[-2] * splits,
        "heads_each": group // splits,
        "n_blocks": triton.cdiv(inputs.max_seqlen_k, config.block_n),
    }
    return Launch(_bwd_dkdv_kernel, "dkdv" if dq is None else "bwd", args, config, heads=args["n_out_heads"]), (dk, dv)


def dq_launch(inputs, dout, rows, config):
    """The launch of the dq kernel, and what it writes."""
    dq = inputs.q.new_empty(inputs.q.shape)
    args = problem_args(inputs, config, q=inputs.q, k=inputs.k, v=inputs.v, dout=dout, dq=dq)
    args |= {"row_ptrs": rows, "n_blocks": triton.cdiv(inputs.max_seqlen_q, config.block_m)}
    return Launch(_bwd_dq_kernel, "dq", args, config), dq
