"""What an implementation declares, and the reasons most of them share."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Implementation:
    """One way to solve the task.

    Attributes:
        name: key in IMPLEMENTATIONS and in the CSV.
        what: one line for the table of `python -m bench.run --list`.
        unsupported_reasons: (Case, device type) -> reasons why it cannot run it here; an empty list means it can.
        build: (Case, device) -> function (q, k, v) -> dict of results in the layout below. Whatever build does is
            outside the timing: masks, packed offsets, compilers. Results: out as q; sink_mass and lse [B, H, T] fp32
            (packed [H, total]); for columns column_mass [B, H, T] or column_mean [B, T].
        layout: the order of q, k, v and out that it likes best, see problem.py.
        task: "attention" or "column_mass".
        backward: False when it has none; it is then run without autograd.
        factor: largest error over plain PyTorch's. Above 2 only with the reason beside the entry.
        exact_statistics: sink_mass in fp32; False when it comes out of low-precision maps or outputs.
        default: measured when no names are given.
    """

    name: str
    what: str
    unsupported_reasons: Callable
    build: Callable
    layout: str = "bthd"
    task: str = "attention"
    backward: bool = True
    factor: float = 2.0
    exact_statistics: bool = True
    default: bool = True


def limits(*, devices=("cuda", "cpu"), kinds=None, dtypes=None, capability=None, package=None):
    """`unsupported_reasons` from a list of what is supported; None is everything.

    Args:
        capability: smallest CUDA compute capability, as (major, minor).
        package: dotted name that must be installed.
    """

    def reasons(case, device):
        found = []
        if device not in devices:
            found.append(f"runs on {' and '.join(devices)}, got {device}")
        elif device == "cuda" and capability and torch.cuda.get_device_capability() < capability:
            found.append(f"needs compute capability {capability}, got {torch.cuda.get_device_capability()}")
        if kinds and case.kind not in kinds:
            found.append(f"solves {', '.join(kinds)}, got {case.kind}")
        if dtypes and case.dtype not in dtypes:
            found.append(f"takes {', '.join(dtypes)}, got {case.dtype}")
        if package and not installed(package):
            found.append(f"{package} is not installed")
        return found

    return reasons


def installed(package):
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        # its parent is not there
        return False
