"""Running out of memory is a row of a table: fail alone, before the machine does, and tell it from other errors."""

import gc
import re
import resource
from pathlib import Path

import torch


def limit_memory(share=0.85):
    """Let this process fail, alone, at a share of the memory that is free now (CPU, Linux; elsewhere nothing)."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        available = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())[1])
        resource.setrlimit(resource.RLIMIT_DATA, (int(share * available), resource.RLIM_INFINITY))


def is_out_of_memory(error):
    words = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def release(device):
    """Give back what a failed call left behind."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
