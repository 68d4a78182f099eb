"""Why a vendor backend cannot run a problem: what all of them share."""

import functools
from importlib import metadata

import torch

from .self_check import failures, kind_of

MAX_SINKS = 16


def common(inputs, dtypes, max_head_dim, capabilities, softcap=False):
    """Reasons that need no device work.

    Args:
        dtypes: the dtypes of q that the kernel takes.
        capabilities: major compute capabilities that it runs on.
        softcap: whether it knows softcap.
    """
    q, head_dim = inputs.q, inputs.q.shape[-1]
    reasons = list(_device_reasons(q.device.type, q.device.index, capabilities))
    if q.dtype not in dtypes:
        reasons.append(f"takes {' and '.join(map(str, dtypes))}, got {q.dtype}")
    if head_dim % 8 or head_dim > max_head_dim:
        reasons.append(f"head_dim must be a multiple of 8 up to {max_head_dim}, got {head_dim}")
    others = [name for name in inputs.stats if name != "sink_mass"]
    if others:
        reasons.append(f"has sink_mass only, got {', '.join(others)}")
    if inputs.stats and inputs.sinks is not None:
        reasons.append("takes the first n keys as sinks: others cannot be hidden from its backward, got positions")
    if inputs.stats and inputs.n_sinks > MAX_SINKS:
        reasons.append(f"takes at most {MAX_SINKS} sinks a sequence, got {inputs.n_sinks}")
    if not inputs.softmax_scale > 0.0:
        reasons.append(f"softmax_scale must be positive, got {inputs.softmax_scale}")
    if inputs.softcap and not softcap:
        reasons.append(f"knows no softcap, got {inputs.softcap}")
    if 0 in inputs.q.shape or 0 in inputs.k.shape:
        reasons.append("takes no empty tensors")
    return reasons


@functools.cache
def installed(distribution):
    """Version of an installed distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _device_reasons(device_type, index, capabilities):
    if device_type != "cuda" or torch.version.hip:
        return (f"runs on NVIDIA GPUs, got {device_type}",)
    major, minor = torch.cuda.get_device_capability(index)
    if major not in capabilities:
        return (f"runs on compute capabilities {', '.join(f'{x}.x' for x in capabilities)}, got {major}.{minor}",)
    return ()


# asked once, not traced, as in the triton backend
_device_reasons._dynamo_marked_constant = True
installed._dynamo_marked_constant = True


def checked(backend, inputs, reasons):
    """`reasons`, or when there is none what the self-check says of the backend with this name."""
    if reasons:
        return reasons
    return list(failures(backend, kind_of(inputs), inputs.q.device.index))
