"""Time tile configurations on this machine's GPU and write the fastest to a file that SURGERY_TILES names.

    python -m surgery_kernels.backends.triton.tune --head-dim 128 --write tiles.json
    SURGERY_TILES=tiles.json python train.py

Opt-in: nothing is timed during training. A configuration that fails the self-check is never timed; one that does not
fit the device is left out. Rows of the file replace the built-in ones for their compute capability, kernel, head dim
and element size, and stand before them in the list that the self-check goes through.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from dataclasses import astuple
from pathlib import Path

import torch

from ...types import AttnInputs
from . import configs, self_check
from .backward import preprocess_launches, row_buffers
from .configs import TileConfig
from .forward import forward_launch
from .run import choices, launch_of

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def candidates(itemsize):
    """Every configuration worth a try, for elements of `itemsize` bytes."""
    blocks = (16, 32, 64, 128) if itemsize == 4 else (32, 64, 128)
    stages = (1, 2) if itemsize == 4 else (1, 2, 3, 4)
    return [TileConfig(*numbers) for numbers in itertools.product(blocks, blocks, (4, 8), stages)]


def problem(head_dim, dtype, device, length=4096, tokens=16384, n_heads=32, n_kv=8):
    """Causal self-attention with sink mass, as in training: (inputs, dout, rows of the backward)."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(heads):
        shape = (max(1, tokens // length), length, heads, head_dim)
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    q, k, v, dout = randn(n_heads), randn(n_kv), randn(n_kv), randn(n_heads)
    inputs = AttnInputs(q, k, v, head_dim**-0.5, max_seqlen_q=length, max_seqlen_k=length)
    smallest = configs.FALLBACKS[q.element_size()][-1]
    launch, (out, lse, stats) = forward_launch(inputs, smallest)
    launch.run()
    dstats = torch.full_like(stats, 1.0 / length)
    rows = row_buffers(inputs, dstats)
    for launch in preprocess_launches(inputs, out, lse, stats, dout, None, dstats, rows, smallest):
        launch.run()
    return inputs, dout, rows


def milliseconds(launch):
    """Median time of a launch; the first call compiles and is not counted."""
    if launch.args["device"].type == "cuda":
        from triton.testing import do_bench

        return do_bench(launch.run, warmup=10, rep=50, return_mode="median")
    launch.run()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        launch.run()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def tune(kernel, inputs, dout, rows, tried, report=print):
    """The fastest configuration that computes correctly.

    Args:
        kernel: one of configs.KERNELS.
        inputs, dout, rows: see `problem`.
        tried: TileConfigs.
        report: called with one line a configuration.
    Returns:
        TileConfig.
    Raises:
        RuntimeError: none of them works.
    """
    best = None
    for config in tried:
        line = f"{kernel} D={inputs.q.shape[-1]} {_row(config)}"
        try:
            worst = max(self_check.errors(kernel, inputs.q, config).values())
            if not worst <= 1.0:
                report(f"{line}: wrong, {worst:.2g} times the tolerance")
                continue
            took = milliseconds(launch_of(kernel, inputs, config, dout, rows))
        except Exception as failure:
            # out of shared memory or registers, or a compiler that gives up: another configuration may do
            report(f"{line}: {type(failure).__name__}: {str(failure).splitlines()[0]}")
            continue
        report(f"{line}: {took:.3f} ms")
        if best is None or took < best[0]:
            best = (took, config)
    if best is None:
        raise RuntimeError(f"no configuration of the {kernel} kernel works for head_dim {inputs.q.shape[-1]}")
    return best[1]


def _row(config):
    return " ".join(str(number) for number in astuple(config))


def write(path, capability, kernel, head_dim, itemsize, config):
    """Put one row into the file of `configs.read_tiles`, which may exist."""
    path = Path(path)
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    table[configs.tile_key(capability, kernel, head_dim, itemsize)] = _row(config)
    path.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--kernel", nargs="+", choices=configs.KERNELS, default=["fwd", "dkdv", "dq"])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens in all")
    parser.add_argument("--write", required=True, help="JSON file to add the fastest rows to")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("tune: needs a CUDA device", file=sys.stderr)
        return 2
    capability = torch.cuda.get_device_capability()
    for head_dim in args.head_dim:
        made = problem(head_dim, DTYPES[args.dtype], "cuda", args.length, args.tokens)
        itemsize = made[0].q.element_size()
        for kernel in args.kernel:
            # the tables' own row tells ptxas more than a candidate does
            built_in = choices(kernel, capability, made[0])[0]
            best = tune(kernel, *made, dict.fromkeys((built_in, *candidates(itemsize))))
            write(args.write, capability, kernel, head_dim, itemsize, best)
            print(f"{kernel} D={head_dim}: {best}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
