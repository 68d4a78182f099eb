"""Fused flash attention with statistics for NVIDIA GPUs from sm_80 on. Triton is imported on first use."""

import importlib.util
import os

import torch

from ...types import Backend
from .configs import MAX_HEAD_DIM

MAX_SINKS = 16


def _interpreted():
    return os.environ.get("TRITON_INTERPRET") == "1"


def _device_reasons(device_type, index):
    """Why nothing can run on this device, as a tuple."""
    reasons = []
    if importlib.util.find_spec("triton") is None:
        reasons.append("triton is not installed")
    if _interpreted():
        return tuple(reasons)
    if device_type != "cuda" or torch.version.hip:
        reasons.append(f"runs on NVIDIA GPUs, got {device_type}")
    elif torch.cuda.get_device_capability(index) < (8, 0):
        major, minor = torch.cuda.get_device_capability(index)
        reasons.append(f"needs compute capability 8.0, got {major}.{minor}")
    return tuple(reasons)


# what torch.compiler.assume_constant_result sets, without its import of the compiler: asked once, not traced
_device_reasons._dynamo_marked_constant = True


def unsupported_reasons(inputs):
    device, dtype, head_dim = inputs.q.device, inputs.q.dtype, inputs.q.shape[-1]
    reasons = list(_device_reasons(device.type, device.index))
    if dtype == torch.bfloat16 and _interpreted():
        reasons.append("Triton's interpreter multiplies bfloat16 wrongly")
    if dtype == torch.float64:
        reasons.append("computes in float32, got float64")
    if head_dim > MAX_HEAD_DIM:
        reasons.append(f"head_dim must be at most {MAX_HEAD_DIM}, got {head_dim}")
    if "sink_mass" in inputs.stats and inputs.sinks is not None and inputs.n_sinks > MAX_SINKS:
        reasons.append(f"takes at most {MAX_SINKS} sink positions a sequence, got {inputs.n_sinks}")
    return reasons


def _forward(inputs):
    from . import run

    return run.forward(inputs)


def _backward(inputs, out, lse, stats, dout, dlse, dstats):
    from . import run

    return run.backward(inputs, out, lse, stats, dout, dlse, dstats)


BACKEND = Backend(
    "triton",
    "NVIDIA GPUs from sm_80 on, fused, O(T) memory, statistics in the pass",
    unsupported_reasons,
    _forward,
    _backward,
)


def column_mass(inputs, lse):
    """`surgery_kernels.column_mass` in one kernel."""
    from . import columns

    return columns.column_mass(inputs, lse)
