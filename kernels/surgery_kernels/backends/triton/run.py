"""What the backend does with a problem: choose configurations, launch, return."""

import functools
import os

import torch
import triton

from .backward import dkdv_launch, dq_launch, preprocess_launches, row_buffers
from .configs import MAX_SINGLE_PASS, choose, read_tiles, single_pass_wins
from .forward import forward_launch
from .launch import narrow, prepare
from .ptxas import options_of
from .self_check import checked


def config_for(kernel, inputs):
    """The first configuration that works on this device, of the file SURGERY_TILES (tune.py) and the tables."""
    q = inputs.q
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else None
    tiles = os.environ.get("SURGERY_TILES")
    tuned = read_tiles(tiles) if tiles else None
    return checked(kernel, q, choices(kernel, capability, inputs, tuned))


def choices(kernel, capability, inputs, tuned=None):
    """The configurations of `choose` for a problem, the built-in one with what this Triton's ptxas is told."""
    q = inputs.q
    ptxas = options_of(kernel, capability, inputs, triton.__version__)
    return choose(kernel, capability, q.shape[-1], q.element_size(), tuned, ptxas)


def launch_of(kernel, inputs, config, dout=None, rows=None):
    """The Launch of one kernel: for what times or compiles it by itself.

    Args:
        kernel: one of configs.KERNELS.
        dout, rows: of the backward, see `row_buffers`.
    """
    if kernel == "fwd":
        return forward_launch(inputs, config)[0]
    if kernel == "dq":
        return dq_launch(inputs, dout, rows, config)[0]
    dq = torch.zeros_like(inputs.q, dtype=torch.float32) if kernel == "bwd" else None
    return dkdv_launch(inputs, dout, rows, config, dq=dq)[0]


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


def wants_single_pass(inputs):
    """Whether the backward adds dq up by atomics: as SURGERY_BACKWARD says, else as the tables do.

    Raises:
        ValueError: SURGERY_BACKWARD has another value, or asks for it with a head dim above MAX_SINGLE_PASS or where
            PyTorch is set to deterministic algorithms.
    """
    q = inputs.q
    wanted = os.environ.get("SURGERY_BACKWARD", "auto")
    if wanted not in ("auto", "two_pass", "single_pass"):
        raise ValueError(f"SURGERY_BACKWARD must be auto, two_pass or single_pass, got {wanted!r}")
    deterministic = torch.are_deterministic_algorithms_enabled()
    if wanted == "single_pass" and deterministic:
        raise ValueError("SURGERY_BACKWARD=single_pass sums in no fixed order, but deterministic algorithms are on")
    if wanted == "single_pass" and q.shape[-1] > MAX_SINGLE_PASS:
        raise ValueError(f"SURGERY_BACKWARD=single_pass takes head dims up to {MAX_SINGLE_PASS}, got {q.shape[-1]}")
    if wanted == "auto" and q.is_cuda and not deterministic:
        return single_pass_wins(torch.cuda.get_device_capability(q.device), q.shape[-1], q.element_size())
    return wanted == "single_pass"


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
    single = wants_single_pass(inputs)
    dq_config, dkdv_config = config_for("dq", inputs), config_for("bwd" if single else "dkdv", inputs)
    for launch in preprocess_launches(inputs, out, lse, stats, dout, dlse, dstats, rows, dq_config):
        launch.run()
    dq_sum = torch.zeros(inputs.q.shape, dtype=torch.float32, device=inputs.q.device) if single else None
    splits = head_splits(inputs, dkdv_config)
    launch, (dk, dv) = dkdv_launch(inputs, dout, rows, dkdv_config, splits, dq_sum)
    launch.run()
    if splits > 1:
        dk, dv = (x.unflatten(-2, (-1, splits)).sum(-2).to(inputs.k.dtype) for x in (dk, dv))
    if single:
        return (dq_sum * (sign * inputs.softmax_scale)).to(inputs.q.dtype), dk, dv
    launch, dq = dq_launch(inputs, dout, rows, dq_config)
    launch.run()
    return (dq if sign == 1 else dq * sign), dk, dv
