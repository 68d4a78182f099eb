"""The CUDA epilogue of csrc/: what nvcc makes of it, and on a GPU how near it comes to the speed of a copy.

python -m bench.epilogue --csv bench/results/epilogue_nvcc.csv     registers and spills, no GPU needed
python -m bench.epilogue --bandwidth --csv epilogue.csv            GB/s of each kernel beside a copy's
"""

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from surgery_kernels.backends.sink_epilogue import build, cuda

from .choice import N_HEADS, TOKENS, interleaved, problem

COMPILED = ("nvcc", "arch", "kernel", "dtype", "head_dim", "sinks", "registers", "spill_stores", "spill_loads", "stack")
TIMED = ("gpu", "torch", "head_dim", "length", "sinks", "kernel", "gigabytes", "gb_per_s", "of_copy")
# mangled: kernel, then the layout's element type, lanes and vectors, then the most sinks
MANGLED = re.compile(
    r"sink_(forward|fold|backward|reduce)_kernel.*?(8BFloat16|4Half|f)(?:Li(\d+)ELi(\d+)EE(?:Li(\d+))?)?E"
)
DTYPES = {"8BFloat16": ("bfloat16", 8), "4Half": ("float16", 8), "f": ("float32", 4)}


def nvcc_version():
    text = subprocess.run([build.find_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V([\d.]+)", text).group(1)


def compiled(archs=build.ARCHS):
    """Compile for `archs` in one call; one row a kernel and architecture."""
    with tempfile.TemporaryDirectory() as folder:
        log = build.compile_to(Path(folder) / build.NAME, archs, ("-Xptxas", "-v"))
    return parse(log, nvcc_version())


def parse(log, version):
    """Rows of ptxas' verbose log."""
    rows = []
    for part in log.split("Compiling entry function")[1:]:
        kernel, dtype, lanes, vectors, sinks = MANGLED.search(part).groups()
        name, per_vector = DTYPES[dtype]
        head_dim = int(lanes) * int(vectors) * per_vector if lanes else "any"
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
        ).groups()
        registers = re.search(r"Used (\d+) registers", part).group(1)
        arch = re.search(r"for 'sm_(\d+)'", part).group(1)
        key = version, int(arch), kernel, name, head_dim, sinks or "any"
        rows.append((*key, *map(int, (registers, stores, loads, stack))))
    return [dict(zip(COMPILED, row, strict=True)) for row in sorted(rows, key=str)]


def bandwidth(lengths=(512, 4096, 16384), head_dims=(64, 128), sinks=(1, 4, 16), repetitions=50):
    """Rows of GB/s on this GPU. Every byte counts once: q, dout, out, dq in and out; the sinks are too few to count."""
    for head_dim in head_dims:
        size = TOKENS * N_HEADS * head_dim * 2
        for length in lengths:
            for n in sinks:
                inputs = problem(length, head_dim)
                inputs = replace(inputs, n_sinks=n)
                steps = {"copy": copy_of(inputs.q), **kernels_of(inputs)}
                bytes_of = {"copy": 2, "forward": 1, "fold": 4, "backward": 4, "backward with out": 5}
                seconds = interleaved(steps, repetitions)
                speeds = {name: bytes_of[name] * size / seconds[name] / 1e9 for name in steps}
                for name, speed in speeds.items():
                    numbers = bytes_of[name] * size / 1e9, f"{speed:.0f}", f"{speed / speeds['copy']:.3f}"
                    row = torch.cuda.get_device_name(), torch.__version__, head_dim, length, n, name, *numbers
                    yield dict(zip(TIMED, row, strict=True))


def copy_of(q):
    target = torch.empty_like(q)
    return lambda: target.copy_(q)


def kernels_of(inputs):
    """name -> function that runs one kernel of the epilogue (the backward with its reduction)."""
    out, dout, dq, dk, dv = (torch.randn_like(x) for x in (inputs.q,) * 3 + (inputs.k,) * 2)
    lse, g, extra = torch.randn((3, *inputs.rows_shape), device=inputs.q.device).add_(5.0)
    folded, folded_dout = torch.empty_like(out), torch.empty_like(out)
    rows = (inputs, lse, g, dout, dq, dk, dv)
    return {
        "forward": lambda: cuda.sink_mass(inputs, lse),
        "fold": lambda: cuda.fold(inputs, out, dout, extra, folded, folded_dout),
        "backward": lambda: cuda.add_sinks(*rows, delta=extra),
        "backward with out": lambda: cuda.add_sinks(*rows, out=out, extra=extra),
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bandwidth", action="store_true", help="time the kernels on this GPU")
    parser.add_argument("--arch", type=int, nargs="+", default=build.ARCHS)
    parser.add_argument("--csv", type=Path, help="file to write")
    args = parser.parse_args(argv)
    if args.bandwidth and not torch.cuda.is_available():
        parser.error("--bandwidth needs a CUDA device")
    rows, fields = (bandwidth(), TIMED) if args.bandwidth else (compiled(args.arch), COMPILED)
    made = []
    for row in rows:
        made.append(row)
        print(*row.values(), flush=True)
    if args.csv:
        with open(args.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fields, lineterminator="\n")
            writer.writeheader()
            writer.writerows(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
