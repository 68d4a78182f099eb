"""Compile the Triton kernels ahead of time, without a GPU, and record what the compiler made of them.

    python -m bench.aot --csv bench/results/aot.csv            every row of the tables, this Triton's rows replaced
    python -m bench.aot --arch 90 --head-dim 128 --kernel fwd  some of them, printed
    python -m bench.aot --compare bench/results/aot.csv        what sink_mass changes, from a table that exists

A kernel goes through the launcher and the specialisation of a real call; only the launch is left out. The lines
show registers a thread, spilled bytes, shared memory, tensor-core instructions in the machine code (mma is HMMA,
wgmma HGMMA, tcgen05 UTC*MMA), and of the loop over full tiles, where the time goes, all instructions and those that
compute on tensor cores, take exp2, or move data.
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
CONFIG = ["block_m", "block_n", "num_warps", "num_stages", "max_registers", "register_usage"]
TENSOR_CORE = {"mma": r"\bHMMA\.", "wgmma": r"\bHGMMA\.", "tcgen05": r"\bUTC\w*MMA"}
# bytes a multiprocessor has for a program's tiles
SHARED_MEMORY = {80: 166912, 86: 101376, 90: 232448, 100: 232448}
# "the same" registers a thread: as many, give or take
REGISTERS_EQUAL = 2
# loads or stores of shared memory in a loop: no more than so many above
SHARED_EQUAL = 2
# of the loop over full tiles
MIX = {
    "loop_tensor": "|".join(TENSOR_CORE.values()),
    "loop_exp2": r"\bMUFU\.EX2",
    "loop_shared_load": r"\bLDSM?\b",
    "loop_shared_store": r"\bST(S|SM)\b",
    "loop_global_load": r"\bLDG(STS)?\b",
    "loop_global_store": r"\b(STG|REDG?|ATOMG?)\b",
}
MEASURED = ["registers", "spill_bytes", "smem", *TENSOR_CORE, "loop", *MIX]
FIELDS = KEY + CONFIG + MEASURED


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


def causal_launch(kernel, head_dim, dtype, config_of, sink_mass=True, batch=2, length=4096, n_heads=32, n_kv=8):
    """A Launch of causal self-attention on tensors without memory.

    Args:
        config_of: AttnInputs -> TileConfig.
    """
    from surgery_kernels.backends.triton.backward import row_buffers
    from surgery_kernels.backends.triton.run import launch_of

    q = torch.empty(batch, length, n_heads, head_dim, dtype=dtype, device="meta")
    k = torch.empty(batch, length, n_kv, head_dim, dtype=dtype, device="meta")
    stats = ("sink_mass",) if sink_mass else ()
    inputs = AttnInputs(q, k, k, head_dim**-0.5, stats=stats, max_seqlen_q=length, max_seqlen_k=length)
    dstats = torch.empty(1, *inputs.rows_shape, device="meta") if sink_mass else None
    return launch_of(kernel, inputs, config_of(inputs), q, row_buffers(inputs, dstats))


def compile_launch(launch, arch):
    """Compile for `arch`.

    Returns:
        (Triton's compiled kernel, what ptxas said).
    """
    driver.set_active(NoDevice(arch))
    log = io.StringIO()
    with tempfile.TemporaryDirectory() as cache, knobs.cache.scope(), knobs.nvidia.scope():
        knobs.cache.dir = cache
        knobs.nvidia.dump_ptxas_log = True
        with contextlib.redirect_stdout(log):
            return launch.kernel.warmup(**launch.kernel_args, **launch.options, grid=launch.grid), log.getvalue()


def read_binary(cubin, log):
    """dict with the fields of MEASURED but smem, from a binary and what ptxas said."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-sass", path]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    loop = hot_loop(sass)
    row = {
        "registers": int(re.search(r"Used (\d+) registers", log).group(1)),
        "spill_bytes": max(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)),
    }
    row |= {name: len(re.findall(pattern, sass)) for name, pattern in TENSOR_CORE.items()} | {"loop": len(loop)}
    return row | {name: sum(bool(re.search(pattern, text)) for text in loop) for name, pattern in MIX.items()}


def hot_loop(sass):
    """Instructions of the loop over full tiles: of the two loops, the shortest with a tensor-core instruction, the one
    without masks. What it jumps over, the statistic's code on tiles without a sink, is left out."""
    code = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+([^;]+);", sass, re.MULTILINE)
    index = {int(address, 16): i for i, (address, _) in enumerate(code)}
    jumps = {}
    for i, (_, text) in enumerate(code):
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if target:
            jumps[i] = index.get(int(target.group(1), 16), i)
    loops = [_walk(code, start, end, jumps) for end, start in jumps.items() if start < end]
    return min((loop for loop in loops if _has_tensor_core(loop)), key=len, default=[])


def _walk(code, start, end, jumps):
    """Instructions from start to end, with the conditional jumps taken that pass over no tensor-core instruction."""
    loop = []
    i = start
    while i <= end:
        loop.append(code[i][1])
        target = jumps.get(i, i)
        skips = i < target <= end and not _has_tensor_core(text for _, text in code[i:target])
        i = target if skips else i + 1
    return loop


def _has_tensor_core(texts):
    return any(re.search(MIX["loop_tensor"], text) for text in texts)


def measure(kernel, arch, head_dim, dtype, sink_mass):
    """One row of the CSV: a kernel with the configuration of the tables."""
    from surgery_kernels.backends.triton.run import choices

    launch = causal_launch(
        kernel, head_dim, dtype, lambda inputs: choices(kernel, divmod(arch, 10), inputs)[0], sink_mass
    )
    key = (triton.__version__, arch, kernel, head_dim, str(dtype).removeprefix("torch."), int(sink_mass))
    row = dict(zip(KEY, key, strict=True))
    row |= {name: getattr(launch.config, name) for name in CONFIG}
    compiled, log = compile_launch(launch, arch)
    return row | {"smem": compiled.metadata.shared} | read_binary(compiled.asm["cubin"], log)


def rows(archs=ARCHS, kernels=configs.KERNELS, head_dims=HEAD_DIMS, sink_masses=(0, 1)):
    """Yield the rows of the tables' first choices, bf16."""
    for arch in archs:
        for kernel in kernels:
            for head_dim in head_dims:
                if kernel == "bwd" and head_dim > configs.MAX_SINGLE_PASS:
                    continue
                for sink_mass in sink_masses:
                    yield measure(kernel, arch, head_dim, torch.bfloat16, sink_mass)


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


def programs(row):
    """Programs of a CSV row that fit a multiprocessor at once."""
    # a warp gets its registers in steps of 256, 8 a thread
    by_registers = 65536 // (-(-int(row["registers"]) // 8) * 8 * 32 * int(row["num_warps"]))
    return min(by_registers, SHARED_MEMORY[int(row["arch"])] // max(int(row["smem"]), 1))


def same(row, other):
    """What a kernel shares with the one with sink_mass, as {what: bool}: registers a thread, resident programs, and
    the instruction mix of the loop over full tiles.

    The mix is exact but for shared memory, of which sink_mass may add no more than SHARED_EQUAL: ptxas may load a
    fragment again rather than keep it.
    """
    exact = [name for name in MIX if "shared" not in name]
    near = [name for name in MIX if "shared" in name]
    return {
        "registers": abs(int(row["registers"]) - int(other["registers"])) <= REGISTERS_EQUAL,
        "programs": programs(row) == programs(other),
        "mix": all(int(row[name]) == int(other[name]) for name in exact)
        and all(int(other[name]) - int(row[name]) <= SHARED_EQUAL for name in near),
    }


def compare(table):
    """Yield lines on what sink_mass changes: one a pair that differs by `same`, and counts.

    Args:
        table: rows of `read_csv`.
    """
    rest = [name for name in KEY if name != "sink_mass"]
    by_key = {tuple(row[name] for name in KEY): row for row in table}
    counts = {}
    for row in table:
        if row["sink_mass"] != "0":
            continue
        other = by_key.get((*(row[name] for name in rest), "1"))
        if other is None:
            raise ValueError(f"no row with sink_mass for {' '.join(row[name] for name in rest)}")
        found = same(row, other)
        # the single pass is no default
        counts.setdefault((row["triton"], row["kernel"] == "bwd"), []).append(found)
        if not all(found.values()):
            changed = [
                f"{name} {row[name]} -> {other[name]}" for name in ("registers", *MIX) if row[name] != other[name]
            ]
            yield f"{' '.join(row[name] for name in rest)}: {', '.join(changed)}"
    for (release, single_pass), found in sorted(counts.items()):
        n = {name: sum(one[name] for one in found) for name in found[0]}
        yield (
            f"triton {release}, {'single pass' if single_pass else 'default kernels'}: {len(found)} pairs, registers "
            f"within +-{REGISTERS_EQUAL} in {n['registers']}, same resident programs in {n['programs']}, same "
            f"instruction mix of the loop in {n['mix']}"
        )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS)
    parser.add_argument("--kernel", nargs="+", default=configs.KERNELS)
    parser.add_argument("--head-dim", type=int, nargs="+", default=HEAD_DIMS)
    parser.add_argument("--sink-mass", type=int, nargs="+", default=(0, 1))
    parser.add_argument("--csv", help="table to update")
    parser.add_argument("--compare", metavar="CSV", help="print what sink_mass changes in a table; compiles nothing")
    args = parser.parse_args(argv)
    if args.compare:
        print(*compare(read_csv(args.compare)), sep="\n")
        return 0
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
