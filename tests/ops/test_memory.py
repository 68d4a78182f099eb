"""The cpu backend never holds a score matrix: its peak memory grows with T, the reference's with T squared."""

import os
import subprocess
import sys

import pytest

# one process a case; writing 5 to clear_refs (proc(5)) forgets the peak, which `import torch` set
SCRIPT = """
import sys, torch
import surgery_kernels as sk
from surgery_kernels.testing import make_qkv

torch.set_num_threads(1)
backend, stats, lengths = sys.argv[1], tuple(sys.argv[2].split("+")), [int(x) for x in sys.argv[3:]]

def resident(kind):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(kind))

def step(length):
    leaves = make_qkv(1, length, length, 1, 1, 32)
    result = sk.flash_attn_stats(*leaves, stats=stats, backend=backend)
    (result.out.sum() + result.lse.sum() + sum(rows.sum() for rows in result.stats.values())).backward()

step(256)
for length in lengths:
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")
    before = resident("VmRSS")
    step(length)
    print(resident("VmHWM") - before)
"""


pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory read from Linux /proc")


def growth(backend, stats, *lengths):
    """Bytes of peak memory that one forward and backward adds, for each length."""
    # freed memory goes back at once; kept pages would hide the next length's growth
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, backend, stats, *map(str, lengths)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env=environment,
    )
    return [int(line) for line in run.stdout.split()]


@pytest.mark.parametrize("stats", ["sink_mass", "sink_mass+entropy+max_logit"])
def test_cpu_backend_is_linear_in_length(stats):
    middle, large = growth("cpu", stats, 4096, 8192)
    score_matrix = 8192 * 8192 * 4
    assert large < score_matrix, f"{large / 2**20:.0f} MiB at T = 8192"
    # the allocator keeps some pages; a quadratic term would be off by at least score_matrix / 4
    assert large < 3 * middle + score_matrix / 8, (middle, large)


def test_reference_is_quadratic_so_the_measure_can_tell():
    small, large = growth("reference", "sink_mass", 2048, 4096)
    assert large > 3 * small, (small, large)
    assert large > 2048 * 2048 * 4
