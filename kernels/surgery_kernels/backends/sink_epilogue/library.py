"""The library of csrc/, loaded with ctypes: the C struct's twin, and where the file comes from.

A C interface with raw pointers needs no header of torch, so one file serves every release of torch and Python
(csrc/README.md compares it with torch's stable ABI).
"""

import ctypes
import functools
import logging
import os
from pathlib import Path

import torch

from . import build

logger = logging.getLogger("surgery_kernels")

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
TENSORS = ("q", "k", "v", "out", "dout", "dq_in", "dq", "dk", "dv", "folded_out", "folded_dout")
ROWS = ("lse", "g", "extra", "delta", "sink_mass", "partial")
LENGTHS = ("cu_q", "cu_k", "first_key", "used_q", "used_k", "positions")
STRIDES = ("rows_batch", "rows_head")
NUMBERS = (
    "batch",
    "len_q",
    "len_k",
    "n_heads",
    "group",
    "head_dim",
    "n_sinks",
    "left",
    "right",
    "dtype",
    "dq_in_first",
    "folded_first",
    "rows_per_block",
    "n_splits",
)


class TensorRef(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("token", ctypes.c_int64),
        ("head", ctypes.c_int64),
    )


class SinkParams(ctypes.Structure):
    """csrc/params.h, field by field."""

    _fields_ = (
        *((name, TensorRef) for name in TENSORS),
        *((name, ctypes.c_void_p) for name in ROWS + LENGTHS),
        *((name, ctypes.c_int64) for name in STRIDES),
        *((name, ctypes.c_int32) for name in NUMBERS),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


def open_library(path):
    """The functions of a compiled library, with their types."""
    library = ctypes.CDLL(str(path))
    for name in ("forward", "fold", "backward"):
        function = getattr(library, f"surgery_sink_{name}")
        function.argtypes = (ctypes.POINTER(SinkParams), ctypes.c_void_p)
    library.surgery_error_string.restype = ctypes.c_char_p
    expected, got = ctypes.sizeof(SinkParams), library.surgery_params_size()
    if got != expected:
        raise build.BuildError(f"{path} is of another version: its struct has {got} bytes, expected {expected}")
    return library


@functools.cache
def load(arch):
    """The library for compute capability `arch` (90 for 9.0): installed with the package, or built now.

    Raises:
        BuildError: why there is none. SURGERY_BUILD_CUDA=0 forbids to build at first use.
    """
    installed = Path(__file__).resolve().parents[2] / build.NAME
    if installed.exists():
        return open_library(installed)
    if os.environ.get("SURGERY_BUILD_CUDA") == "0":
        raise build.BuildError("SURGERY_BUILD_CUDA=0")
    logger.info("compiling the CUDA sink epilogue for sm_%d, once", arch)
    return open_library(build.cached(arch))


@functools.cache
def reason_against(arch):
    """Why the CUDA epilogue cannot run on this architecture, or None; the torch one serves then."""
    try:
        load(arch)
    except (build.BuildError, OSError) as failure:
        logger.warning("no CUDA sink epilogue (%s): the torch one serves, exact but slower", failure)
        return str(failure)
    return None
