"""What to tell ptxas about registers, for this Triton release: the rows of ptxas.csv, without a GPU.

    python -m bench.ptxas                        every row of the tiles' tables
    python -m bench.ptxas --arch 90 --kernel dq  some of them

ptxas makes the binary again and again from the same PTX. Taken are options under which the kernels with and without
sink_mass have the same registers, instruction mix and resident programs (`aot.same`), nothing spills up to head dim 128
and no loop over full tiles is more than 2 % longer than without options. Of these it is the pair with the shortest
loops, or the first that comes within 1 % of the shortest loops that any level gives. A row that the CSV has is tried
first. Prints a line a pair, "none" where nothing will do: the shortest loops are taken there. Then
`python -m bench.aot --csv bench/results/aot.csv` records the result.
"""

import argparse
import contextlib
import csv
import io
import itertools
import re
import sys

import torch
import triton
from surgery_kernels.backends.triton import configs, ptxas
from triton import knobs
from triton.compiler import make_backend

from . import aot

KERNELS = ("fwd", "dkdv", "dq")
# of --register-usage-level: between them nothing else happens (0 to 3, 4 to 5, 6 to 10 are alike)
LEVELS = (5, 10, 0)
# how far below the smaller of two natural numbers of registers to look for a cap
DEPTH = 24
# times the loop without options: what a loop may become
LONGER = 1.02
# times the shortest loops: where the search stops
CLOSE = 1.01
NO_SPILLS = 128  # head dims up to which nothing may spill


class Assembler:
    """One kernel's PTX, and the binaries made of it.

    Args:
        launch: Launch.
        arch: 10 * major + minor.
        head_dim: decides whether spills are allowed.
    """

    def __init__(self, launch, arch, head_dim):
        compiled, _ = aot.compile_launch(launch, arch)
        self.backend = make_backend(aot.NoDevice(arch).target)
        self.options = {"num_warps": launch.config.num_warps, "num_stages": launch.config.num_stages}
        self.ptx = compiled.asm["ptx"]
        self.fixed = {"arch": arch, "num_warps": launch.config.num_warps, "smem": compiled.metadata.shared}
        self.made = {}
        self.largest_spill = 0 if head_dim <= NO_SPILLS else self.binary(5, 0)["spill_bytes"]

    def binary(self, level, cap):
        """The fields of `aot.read_binary`, and what `aot.programs` asks for."""
        if (level, cap) not in self.made:
            ptx, n = re.subn(r"(\.reqntid [^\n]*\n)", rf"\1.maxnreg {cap}\n", self.ptx) if cap else (self.ptx, 1)
            if n != 1:
                raise RuntimeError(f"triton {triton.__version__} writes PTX with {n} lines of .reqntid, expected 1")
            options = self.backend.parse_options(self.options | {"ptx_options": f"--register-usage-level={level}"})
            log = io.StringIO()
            with knobs.nvidia.scope(), contextlib.redirect_stdout(log):
                knobs.nvidia.dump_ptxas_log = True
                cubin = self.backend.make_cubin(ptx, {}, options, self.fixed["arch"])
            self.made[level, cap] = aot.read_binary(cubin, log.getvalue()) | self.fixed
        return self.made[level, cap]

    def allows(self, level, cap):
        """Whether options neither spill nor lengthen the loop."""
        row = self.binary(level, cap)
        return row["spill_bytes"] <= self.largest_spill and row["loop"] <= LONGER * self.binary(5, 0)["loop"]


class Pair:
    """The kernels without and with sink_mass, and the search for (level, cap without, cap with) of both."""

    def __init__(self, without, with_sink):
        self.kernels = (without, with_sink)

    def binaries(self, options):
        level, *caps = options
        return [kernel.binary(level, cap) for kernel, cap in zip(self.kernels, caps, strict=True)]

    def loops(self, options):
        return sum(row["loop"] for row in self.binaries(options))

    def allowed(self, options):
        level, *caps = options
        return all(kernel.allows(level, cap) for kernel, cap in zip(self.kernels, caps, strict=True))

    def shortest(self):
        """The level with the shortest loops, without caps."""
        natural = [(level, 0, 0) for level in LEVELS]
        return min((options for options in natural if self.allowed(options)), key=self.loops, default=natural[0])

    def find(self, known=None):
        """Options under which the two are the same, or None.

        Args:
            known: options to try first.
        """
        found = []
        best = self.loops(self.shortest())
        levels = sorted(LEVELS, key=lambda level: self.loops((level, 0, 0)))
        joint = ((level, cap, cap) for level in levels for cap in self.caps(level))
        apart = ((level, *caps) for level in levels for caps in itertools.product(self.caps(level), repeat=2))
        for options in itertools.chain([known] if known else [], ((level, 0, 0) for level in LEVELS), joint, apart):
            if not self.allowed(options) or not all(aot.same(*self.binaries(options)).values()):
                continue
            if self.loops(options) <= CLOSE * best:
                return options
            found.append(options)
        return min(found, key=self.loops, default=None)

    def caps(self, level):
        """Caps to try, the loosest first, then the ones above what is needed: those move ptxas too."""
        natural = sorted(row["registers"] for row in self.binaries((level, 0, 0)))
        needed = range(min(natural[1] + 2, 254), max(natural[0] - DEPTH, 32), -2)
        return [0, 255, *needed, *range(natural[1] + 4, 255, 6)]


def pair(kernel, arch, head_dim):
    """Pair of a kernel with the tiles of its table."""
    config = configs.choose(kernel, divmod(arch, 10), head_dim, 2)[0]
    launches = (
        aot.causal_launch(kernel, head_dim, torch.bfloat16, lambda inputs: config, sink_mass)
        for sink_mass in (False, True)
    )
    return Pair(*(Assembler(launch, arch, head_dim) for launch in launches))


def write(path, new):
    """Put {(triton, arch, kernel, head_dim): (level, cap without, cap with)} into the CSV; no row for (5, 0, 0)."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = {tuple(row[name] for name in ptxas.FIELDS[:4]): row for row in csv.DictReader(file)}
    for key, options in new.items():
        key = tuple(map(str, key))
        rows.pop(key, None)
        if options != (5, 0, 0):
            rows[key] = dict(zip(ptxas.FIELDS, (*key, *options), strict=True))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ptxas.FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows, key=lambda key: (key[0], int(key[1]), key[2], int(key[3]))))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=aot.ARCHS)
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--head-dim", type=int, nargs="+", default=aot.HEAD_DIMS)
    parser.add_argument("--csv", default=ptxas.TABLE, help="table to update")
    args = parser.parse_args(argv)
    release = ptxas.release(triton.__version__)
    known = ptxas.read_table(args.csv)
    missing = 0
    for key in itertools.product([release], args.arch, args.kernel, args.head_dim):
        of = pair(*(key[2], key[1], key[3]))
        options = of.find(known.get(key))
        missing += options is None
        taken = options or of.shortest()
        numbers = [f"{row['registers']} registers, loop {row['loop']}" for row in of.binaries(taken)]
        before = [row["loop"] for row in of.binaries((5, 0, 0))]
        print(*key, *taken, "same" if options else "none:", *numbers, "before", *before, flush=True)
        write(args.csv, {key: taken})
    print(f"{missing} pairs for which nothing will do")
    return 0


if __name__ == "__main__":
    sys.exit(main())
