"""Compile the Triton kernels ahead of time, without a GPU, and record what the compiler made of them.

    python -m bench.aot --csv bench/results/aot.csv            every row of the tables, this Triton's rows replaced
    python -m bench.aot --arch 90 --head-dim 128 --kernel fwd  some of them, printed

A kernel goes through the launcher and the specialisation of a real call; only the launch is left out. The lines
show registers a thread, spilled bytes, shared memory, tensor-core instructions in the machine code (mma is HMMA,
wgmma HGMMA, tcgen05 UTC*MMA), and all instructions of the loop over full tiles, where the time goes.
"""

import argparse
import contextlib
import csv
import io
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from surgery_kernels import AttnInputs
from surgery_kernels.backends.triton import configs
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

ARCHS = (80, 86, 90, 100)
HEAD_DIMS = (32, 64, 80, 96, 128, 192, 256)
KEY = ["triton", "arch", "kernel", "head_dim", "dtype", "sink_mass"]
CONFIG = ["block_m", "block_n", "num_warps", "num_stages"]
MEASURED = ["registers", "spill_bytes", "smem", "mma", "wgmma", "tcgen05", "loop"]
FIELDS = KEY + CONFIG + MEASURED
TENSOR_CORE = {"mma": r"\bHMMA\.", "wgmma": r"\bHGMMA\.", "tcgen05": r"\bUTC\w*MMA"}


class NoDevice:
    """A Triton driver that names a target and has no device."""

    def __init__(self, arch):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch

    def get_current_stream(self, device):
        return 0


def causal_launch(kernel, head_dim, dtype, config, sink_mass=True, batch=2, length=4096, n_heads=32, n_kv=8):
    """A Launch of causal self-attention on tensors without memory."""
    from surgery_kernels.backends.triton.backward import row_buffers
    from surgery_kernels.backends.triton.run import launch_of

    q = torch.empty(batch, length, n_heads, head_dim, dtype=dtype, device="meta")
    k = torch.empty(batch, length, n_kv, head_dim, dtype=dtype, device="meta")
    stats = ("sink_mass",) if sink_mass else ()
    inputs = AttnInputs(q, k, k, head_dim**-0.5, stats=stats, max_seqlen_q=length, max_seqlen_k=length)
    dstats = torch.empty(1, *inputs.rows_shape, device="meta") if sink_mass else None
    return launch_of(kernel, inputs, config, q, row_buffers(inputs, dstats))


def compile_launch(launch, arch):
    """Compile for `arch` and read the binary.

    Returns:
        dict with the fields from registers on.
    """
    driver.set_active(NoDevice(arch))
    log = io.StringIO()
    with tempfile.TemporaryDirectory() as cache, knobs.cache.scope(), knobs.nvidia.scope():
        knobs.cache.dir = cache
        knobs.nvidia.dump_ptxas_log = True
        with contextlib.redirect_stdout(log):
            compiled = launch.kernel.warmup(**launch.kernel_args, **launch.options, grid=launch.grid)
        cubin = Path(cache) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        sass = subprocess.run([_cuobjdump(), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    registers = re.search(r"Used (\d+) registers", log.getvalue())
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log.getvalue())
    row = {
        "registers": int(registers.group(1)),
        "spill_bytes": max(int(n) for n in spills),
        "smem": compiled.metadata.shared,
    }
    return (
        row | {name: len(re.findall(pattern, sass)) for name, pattern in TENSOR_CORE.items()} | {"loop": hot_loop(sass)}
    )


def hot_loop(sass):
    """Instructions of the shortest loop with a tensor-core instruction: of the two loops the one without masks."""
    code = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+([^;]+);", sass, re.MULTILINE)
    index = {int(address, 16): i for i, (address, _) in enumerate(code)}
    lengths = []
    for i, (_, text) in enumerate(code):
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        start = index.get(int(target.group(1), 16), i) if target else i
        if any(re.search(pattern, t) for _, t in code[start:i] for pattern in TENSOR_CORE.values()):
            lengths.append(i + 1 - start)
    return min(lengths, default=0)


def _cuobjdump():
    return knobs.nvidia.cuobjdump.path


def measure(kernel, arch, head_dim, dtype, sink_mass, config):
    """One row of the CSV."""
    launch = causal_launch(kernel, head_dim, dtype, config, sink_mass)
    key = (triton.__version__, arch, kernel, head_dim, str(dtype).removeprefix("torch."), int(sink_mass))
    row = dict(zip(KEY, key, strict=True))
    row |= {name: getattr(config, name) for name in CONFIG}
    return row | compile_launch(launch, arch)


def rows(archs=ARCHS, kernels=configs.KERNELS, head_dims=HEAD_DIMS, sink_masses=(0, 1)):
    """Yield the rows of the tables' first choices, bf16."""
    for arch in archs:
        for kernel in kernels:
            for head_dim in head_dims:
                if kernel == "bwd" and head_dim > configs.MAX_SINGLE_PASS:
                    continue
                config = configs.choose(kernel, (arch // 10, arch % 10), head_dim, 2)[0]
                for sink_mass in sink_masses:
                    yield measure(kernel, arch, head_dim, torch.bfloat16, sink_mass, config)


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path, new):
    """Write `new` over the rows with the same key, sorted."""
    path = Path(path)
    table = {tuple(row[name] for name in KEY): row for row in (read_csv(path) if path.exists() else ())}
    table |= {tuple(str(row[name]) for name in KEY): row for row in new}
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            table[key] for key in sorted(table, key=lambda key: (key[0], int(key[1]), key[2], int(key[3])))
        )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS)
    parser.add_argument("--kernel", nargs="+", default=configs.KERNELS)
    parser.add_argument("--head-dim", type=int, nargs="+", default=HEAD_DIMS)
    parser.add_argument("--sink-mass", type=int, nargs="+", default=(0, 1))
    parser.add_argument("--csv", help="table to update")
    args = parser.parse_args(argv)
    print(" ".join(FIELDS), flush=True)
    done = []
    for row in rows(args.arch, args.kernel, args.head_dim, args.sink_mass):
        done.append(row)
        print(" ".join(str(row[name]) for name in FIELDS), flush=True)
        if args.csv:
            write_csv(args.csv, done)
    return 0


if __name__ == "__main__":
    sys.exit(main())
