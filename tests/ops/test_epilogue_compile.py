"""What nvcc makes of csrc/, without a GPU: compiled for sm_80, 90 and 100 in one call, compared with the record."""

import csv
import re
import subprocess
from pathlib import Path

import pytest
from surgery_kernels.backends.sink_epilogue import build, library

from bench import epilogue

RECORD = Path(__file__).parents[2] / "bench" / "results" / "epilogue_nvcc.csv"


def read_record():
    with open(RECORD, newline="") as file:
        return list(csv.DictReader(file))


try:
    NVCC = build.find_nvcc()
except build.BuildError as failure:
    NVCC, WHY = None, str(failure)
else:
    WHY = ""
needs_nvcc = pytest.mark.skipif(NVCC is None, reason=WHY)


def key(row):
    return str(row["arch"]), row["kernel"], row["dtype"], str(row["head_dim"]), row["sinks"]


def test_record_is_complete_and_spills_nothing():
    rows = read_record()
    layouts = {(d, str(n)) for d in ("float32", "float16", "bfloat16") for n in (64, 128, 256)}
    folds = {layout for layout in layouts if layout[0] != "float16"}
    for arch in ("80", "90", "100"):
        for kernel, expected in (("forward", layouts), ("backward", layouts), ("fold", folds)):
            found = {(row["dtype"], row["head_dim"]) for row in rows if (row["arch"], row["kernel"]) == (arch, kernel)}
            assert found == expected
    for row in rows:
        assert (row["spill_stores"], row["spill_loads"], row["stack"]) == ("0", "0", "0"), row
        # two blocks of 256 threads share a multiprocessor
        assert int(row["registers"]) <= 128


@needs_nvcc
def test_compiles_without_spills_and_as_recorded():
    """Registers to +-2 where the record is of this nvcc; one test, so that one process compiles once."""
    compiled = epilogue.compiled()
    recorded = {key(row): row for row in read_record()}
    assert {row["arch"] for row in compiled} == {80, 90, 100} and len(compiled) == len(recorded)
    for row in compiled:
        assert (row["spill_stores"], row["spill_loads"], row["stack"]) == (0, 0, 0), row
        if recorded[key(row)]["nvcc"] == row["nvcc"]:
            assert abs(int(recorded[key(row)]["registers"]) - row["registers"]) <= 2, row


@needs_nvcc
def test_rows_move_16_bytes_at_a_time(tmp_path):
    """In the PTX: left alone, the compiler split the stores into words."""
    target = tmp_path / "sink.ptx"
    flags = ("-O3", "-std=c++17", "-ptx", "-arch=compute_80")
    subprocess.run([NVCC, *flags, "-o", target, build.source_folder() / "api.cu"], check=True, capture_output=True)
    wide = {}
    for part in target.read_text().split(".entry ")[1:]:
        kernel, dtype = epilogue.MANGLED.search(part).groups()[:2]
        loads = len(re.findall(r"ld\.global(?:\.nc)?\.v4", part))
        wide.setdefault((kernel, dtype), set()).add((loads > 0, len(re.findall(r"st\.global\.v4", part)) > 0))
        assert not re.findall(r"ld\.global(?:\.nc)?\.[bu]16", part), "a row is read by element"
    for dtype in ("8BFloat16", "4Half", "f"):
        assert wide["forward", dtype] == {(True, False)}
        assert wide["backward", dtype] == {(True, True)}
    assert wide["fold", "8BFloat16"] == wide["fold", "f"] == {(True, True)}


@needs_nvcc
def test_first_use_compiles_once_and_keeps_it(monkeypatch, tmp_path):
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path))
    path = build.cached(90)
    made = path.stat().st_mtime_ns
    assert build.cached(90) == path and path.stat().st_mtime_ns == made
    assert library.open_library(path).surgery_params_size() == library.ctypes.sizeof(library.SinkParams)
    assert {x.name for x in path.parent.iterdir()} == {build.NAME, "lock"}


@needs_nvcc
def test_compiler_errors_are_told(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DkMaxSinks=oops.oops"))
    with pytest.raises(build.BuildError, match=r"nvcc failed: [\s\S]*oops"):
        build.compile_to(tmp_path / build.NAME, (90,))


def test_unwritable_cache_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "find_nvcc", lambda: "/bin/true")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "file"))
    with pytest.raises(build.BuildError, match="cannot write to"):
        build.cached(90)
