"""What the backend does with a problem: choose configurations, launch, return."""

import functools

import torch
import triton

from .backward import dkdv_launch, dq_launch, preprocess_launches, row_buffers
from .configs import choose
from .forward import forward_launch
from .launch import narrow, prepare
from .self_check import checked


def config_for(kernel, inputs):
    """The first configuration of the tables that works on this device."""
    q = inputs.q
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else None
    return checked(kernel, q, choose(kernel, capability, q.shape[-1], q.element_size()))


@functools.cache
def _multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count


def head_splits(inputs, config):
    """Programs that share a group of query heads in the dk/dv kernel: one, unless the device would stand idle.

    One program sums its group in registers, and nothing else is written. With fewer such programs than
    multiprocessors (a short sequence, few kv heads) each query head gets its own, and fp32 partial sums.
    """
    if not inputs.q.is_cuda:
        return 1
    batch = inputs.cu_seqlens_q.shape[0] - 1 if inputs.is_varlen else inputs.q.shape[0]
    programs = batch * inputs.k.shape[-2] * triton.cdiv(inputs.max_seqlen_k, config.block_n)
    return 1 if programs >= _multiprocessors(inputs.q.device) else inputs.q.shape[-2] // inputs.k.shape[-2]


def forward(inputs):
    inputs, _ = prepare(inputs)
    launch, results = forward_launch(inputs, config_for("fwd", inputs))
    launch.run()
    return results


def backward(inputs, out, lse, stats, dout, dlse, dstats):
    inputs, sign = prepare(inputs)
    dout = None if dout is None else narrow(dout)
    lse, stats, dlse, dstats = (None if x is None else x.contiguous() for x in (lse, stats, dlse, dstats))
    dstats = dstats if inputs.stats else None
    rows = row_buffers(inputs, dstats)
    dq_config, dkdv_config = config_for("dq", inputs), config_for("dkdv", inputs)
    for launch in preprocess_launches(inputs, out, lse, stats, dout, dlse, dstats, rows, dq_config):
        launch.run()
    splits = head_splits(inputs, dkdv_config)
    launch, (dk, dv) = dkdv_launch(inputs, dout, rows, dkdv_config, splits)
    launch.run()
    if splits > 1:
        dk, dv = (x.unflatten(-2, (-1, splits)).sum(-2).to(inputs.k.dtype) for x in (dk, dv))
    launch, dq = dq_launch(inputs, dout, rows, dq_config)
    launch.run()
    return (dq if sign == 1 else dq * sign), dk, dv
