"""What the compiler makes of the Triton kernels, without a GPU: the committed table, and a part of it made again.

Compilation runs in other processes: this one may have Triton's interpreter switched on.
"""

import csv
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import fields
from importlib import metadata, util
from pathlib import Path

import pytest
from surgery_kernels.backends.triton import configs, ptxas

if util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
# triton itself stays unimported: the interpreter's tests decide how it is
TRITON = metadata.version("triton")
ROOT = Path(__file__).parents[2]
TABLE = ROOT / "bench" / "results" / "aot.csv"
PACKAGE = ROOT / "kernels" / "surgery_kernels"
# bytes of shared memory a program, registers and shared memory of a multiprocessor
SMEM_LIMIT = {80: 166912, 86: 101376, 90: 232448, 100: 232448}
REGISTERS = 65536
INSTRUCTION = {80: "mma", 86: "mma", 90: "wgmma", 100: "tcgen05"}


def read(path):
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    text = {"triton", "kernel", "dtype"}
    return [{name: x if name in text else int(x) for name, x in row.items()} for row in rows]


ROWS = read(TABLE)


def pairs():
    """(row without, row with sink_mass) of every kernel."""
    found = defaultdict(dict)
    for row in ROWS:
        found[row["triton"], row["arch"], row["kernel"], row["head_dim"], row["dtype"]][row["sink_mass"]] = row
    return [(pair[0], pair[1]) for pair in found.values()]


def ident(row):
    return "{triton}-sm{arch}-{kernel}-D{head_dim}".format(**row)


def programs(row):
    """Programs that fit a multiprocessor at once."""
    # registers are given out in eights
    by_registers = REGISTERS // (-(-row["registers"] // 8) * 8 * 32 * row["num_warps"])
    return min(by_registers, SMEM_LIMIT[row["arch"]] // max(row["smem"], 1))


def test_table_is_complete_and_current():
    """Every architecture, kernel and head dim, with the configuration that the tables now choose."""
    newest = [row for row in ROWS if row["triton"] == max(row["triton"] for row in ROWS)]
    for arch in configs.TABLES:
        for kernel in configs.KERNELS:
            of = [row for row in newest if (row["arch"], row["kernel"]) == (arch, kernel)]
            expected = {64, 80, 96, 128} if kernel == "bwd" else {64, 80, 96, 128, 256}
            assert {row["head_dim"] for row in of} >= expected
    for row in ROWS:
        key = (ptxas.release(row["triton"]), row["arch"], row["kernel"], row["head_dim"])
        level, *caps = ptxas.read_table().get(key, (5, 0, 0))
        options = {"register_usage": level, "max_registers": caps[row["sink_mass"]]}
        chosen = configs.choose(row["kernel"], divmod(row["arch"], 10), row["head_dim"], 2, ptxas=options)[0]
        recorded = configs.TileConfig(*(row[field.name] for field in fields(configs.TileConfig)))
        assert recorded == chosen, f"{ident(row)}: run python -m bench.aot --csv bench/results/aot.csv"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{ident(row)}-sink{row['sink_mass']}")
def test_recorded_resources(row):
    """It fits, it does not spill up to head dim 128, and its products run on the tensor cores."""
    assert row["smem"] <= SMEM_LIMIT[row["arch"]]
    if row["head_dim"] <= 128:
        # the single pass, off by default, may keep a few registers in memory
        assert row["spill_bytes"] <= (64 if row["kernel"] == "bwd" else 0)
    assert row[INSTRUCTION[row["arch"]]] > 0


@pytest.mark.parametrize("without, with_sink", pairs(), ids=lambda row: ident(row))
def test_sink_mass_costs_no_resources(without, with_sink):
    """Registers, instruction mix and resident programs are the same with and without the statistic."""
    for name in ("mma", "wgmma", "tcgen05", "loop_tensor", "loop_exp2", "loop_global_load", "loop_global_store"):
        assert with_sink[name] == without[name]
    for name in ("loop_shared_load", "loop_shared_store"):
        assert with_sink[name] - without[name] <= 2
    assert abs(with_sink["smem"] - without["smem"]) <= 4096
    assert programs(with_sink) == programs(without)
    # the single pass is no default
    if without["kernel"] != "bwd":
        assert abs(with_sink["registers"] - without["registers"]) <= 2


def test_compare_counts_the_pairs():
    command = [sys.executable, "-m", "bench.aot", "--compare", str(TABLE)]
    done = subprocess.run(command, cwd=ROOT, env=compiled_environment(), check=True, capture_output=True, text=True)
    for release in ("3.6.0", "3.8.0"):
        assert f"triton {release}, default kernels: 84 pairs, registers within +-2 in 84, same" in done.stdout


def compiled_environment(**extra):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return environment | extra


RECORDED = [row for row in ROWS if row["triton"] == TRITON]


@pytest.mark.skipif(not RECORDED, reason=f"no rows for triton {TRITON}")
@pytest.mark.parametrize("arch, head_dim", [(80, 64), (90, 128)])
def test_compiles_as_recorded(arch, head_dim, tmp_path):
    """Registers to +-2, spills, shared memory and tensor-core instructions exactly."""
    made = tmp_path / "aot.csv"
    options = f"--arch {arch} --head-dim {head_dim} --sink-mass 1 --csv {made}"
    command = [sys.executable, "-m", "bench.aot", *options.split()]
    subprocess.run(command, cwd=ROOT, env=compiled_environment(), check=True, capture_output=True)
    recorded = {(row["arch"], row["kernel"], row["head_dim"], row["sink_mass"]): row for row in RECORDED}
    rows = read(made)
    assert len(rows) == len(configs.KERNELS)
    for row in rows:
        expected = recorded[row["arch"], row["kernel"], row["head_dim"], row["sink_mass"]]
        assert abs(row["registers"] - expected["registers"]) <= 2
        assert {**row, "registers": 0} == {**expected, "registers": 0}


KEYS = """
from surgery_kernels.backends.triton import dkdv, dq, forward
print(forward._flash_attn_stats_fwd_kernel.cache_key, dkdv._bwd_dkdv_kernel.cache_key, dq._bwd_dq_kernel.cache_key)
"""


def cache_keys(source_root):
    environment = compiled_environment(PYTHONPATH=str(source_root))
    command = [sys.executable, "-c", KEYS]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, cwd="/")
    return done.stdout.split()


def test_editing_a_statistic_invalidates_the_cache(tmp_path):
    """A jit function that the key does not cover would go on serving its old binary."""
    copy = tmp_path / "surgery_kernels"
    shutil.copytree(PACKAGE, copy)
    before = cache_keys(tmp_path)
    hooks = copy / "backends" / "triton" / "stat_hooks.py"
    text = hooks.read_text()
    for old in ("sink_i + tl.sum(tl.where(sink[None, :], p, 0.0), 1)", "dp + g * sink.to(tl.float32)"):
        assert old in text
        text = text.replace(old, f"{old} + 1.0")
    hooks.write_text(text)
    after = cache_keys(tmp_path)
    assert all(old != new for old, new in zip(before, after, strict=True))
