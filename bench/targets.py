"""Our ratio to each peer, the price of the statistic, and the product's targets, from the CSVs of a run.

    python -m bench.targets --run run.csv --memory memory.csv --train-step train_step.csv --tests ok

Ratios are taken between rows of one run only. `--tests` is how the tests ended: with FAILED no speed-up is printed;
anything but ok is said in the first line. A missing or unfinished file leaves its lines at "not measured".
"""

import argparse
import sys
from pathlib import Path

from .memory_fit import fit_lines
from .records import read_csv
from .train_step_report import target_lines

CASE = ("shape", "kind", "length", "dtype")
OURS = "ours_"
OFF = "_off"
# largest ratio of time with and without the statistic on a GPU, from this length on
ON_OFF = (1.01, 1024)
# mode, head dim -> smallest TFLOP/s at THROUGHPUT_CASE on an H100 or H200
THROUGHPUT = {("forward", 128): 500, ("forward", 64): 380, ("backward", 128): 420, ("backward", 64): 300}
THROUGHPUT_CASE = ("causal", 8192, "bfloat16")
HEAD_DIMS = {"llama3-8b": 128, "llama3.2-1b": 64}
# smallest ratio of a peer's forward and backward to ours
PEERS = {"flex": 1.3}


def _cases(rows, metric):
    """(run, shape, kind, length, dtype, mode) -> {impl: row} of one metric, rows with a value only."""
    found = {}
    for row in rows:
        # the matrix product has no length
        if row["metric"] == metric and row["p50"] != "" and row["length"]:
            key = (row["run"], row["shape"], row["kind"], int(row["length"]), row["dtype"], row["mode"])
            found.setdefault(key, {})[row["impl"]] = row
    return found


def _ours(cells):
    """The fastest of our backends among {impl: row} of times, or None; the oracle is none of them."""
    names = [name for name in cells if name.startswith(OURS) and not name.endswith(OFF) and name != "ours_reference"]
    return min(names, key=lambda name: cells[name]["p50"], default=None)


def _where(key):
    _, shape, kind, length, dtype, mode = key
    return f"{shape} {kind} {length} {dtype} {mode}"


def _judged(passed, text):
    return f"{'pass' if passed else 'FAIL'}  {text}"


def on_off_lines(rows):
    """A line for every case and backend that ran with and without the statistic; forward and backward have a target."""
    limit, since = ON_OFF
    ratios, gpu = {}, set()
    for (run, *case, mode), cells in _cases(rows, "time").items():
        for name in cells.keys() - {"ours_reference"}:
            if name + OFF in cells:
                ratios.setdefault((name, run, *case), {})[mode] = cells[name]["p50"] / cells[name + OFF]["p50"]
                # a driver is a GPU's; the CPU's sink columns are a pass of their own
                gpu |= {name} if cells[name]["driver"] else set()
    lines = []
    for (name, _, shape, kind, length, dtype), modes in sorted(ratios.items()):
        text = f"{name}: {', '.join(f'{mode} {modes[mode]:.3f}' for mode in sorted(modes, reverse=True))}"
        text += f" <= {limit} ({shape} {kind} {length} {dtype})"
        if name in gpu and length >= since:
            lines.append(_judged(max(modes["forward"], modes["backward"]) <= limit, text))
        else:
            lines.append(f"      {text}, no target")
    return lines or [f"not measured  forward, backward <= {limit} on a GPU from {since} tokens on"]


def peer_lines(rows):
    """A line for every case: each peer's time over ours, and the targets among them."""
    lines, targets = [], []
    for key, cells in sorted(_cases(rows, "time").items()):
        ours = _ours(cells)
        if key[5] != "both" or not ours:
            continue
        peers = {name: row["p50"] / cells[ours]["p50"] for name, row in cells.items() if not name.startswith(OURS)}
        failed = _failed(rows, key)
        text = [f"{name} {ratio:.2f}" for name, ratio in sorted(peers.items(), key=lambda item: item[1])]
        text += [f"{name} {unit}" for name, unit in sorted(failed.items())]
        lines.append(f"      time over {ours}'s: {', '.join(text)} ({_where(key)})")
        for name, least in PEERS.items():
            if name in peers:
                verdict = f"{name} over {ours}: {peers[name]:.2f} >= {least} ({_where(key)})"
                targets.append(_judged(peers[name] >= least, verdict))
    missing = [f"not measured  {name} over ours >= {least}" for name, least in PEERS.items()]
    return lines + (targets or missing)


def _failed(rows, key):
    """impl -> red, oom or error, of the case of `key`."""
    case = tuple(map(str, key[:5]))
    failed = [row for row in rows if row["unit"] in ("red", "oom", "error")]
    return {row["impl"]: row["unit"] for row in failed if tuple(row[name] for name in ("run", *CASE)) == case}


def throughput_lines(rows):
    """TFLOP/s against the targets for an H100; "not measured" on anything else."""
    lines = []
    for (mode, head_dim), least in THROUGHPUT.items():
        found = []
        for key, cells in _cases(rows, "throughput").items():
            names = [name for name in cells if name.startswith(OURS) and not name.endswith(OFF)]
            hopper = any("H100" in row["device"] or "H200" in row["device"] for row in cells.values())
            if key[2:5] == THROUGHPUT_CASE and key[5] == mode and HEAD_DIMS.get(key[1]) == head_dim and hopper:
                found += [(name, cells[name]["p50"]) for name in names]
        for name, rate in found:
            lines.append(_judged(rate >= least, f"{name} {mode} head dim {head_dim}: {rate:.0f} >= {least} TFLOP/s"))
        if not found:
            lines.append(f"not measured  {mode} head dim {head_dim} >= {least} TFLOP/s on an H100")
    return lines


def red_lines(rows):
    """A line for every wrong or failed implementation."""
    return [
        f"{row['unit'].upper()}  {row['impl']} ({' '.join(row[name] for name in CASE)}): {row['note']}"
        for row in rows
        if row["unit"] in ("red", "error")
    ]


def report(run=(), memory=(), train_step=(), tests="not run"):
    """All lines, as a list.

    Args:
        run, memory, train_step: rows of the three CSVs.
        tests: ok, FAILED, or any other word for how the tests ended.
    """
    lines = [f"tests: {tests}", *red_lines(run)]
    if tests.startswith("FAILED"):
        return [*lines, "no speed-up is printed while the tests are red"]
    lines += ["", "time with the statistic over time without", *on_off_lines(run)]
    lines += ["", "peers, forward and backward", *peer_lines(run)]
    lines += ["", "throughput", *throughput_lines(run)]
    lines += ["", "memory", *(fit_lines(memory) if memory else ["not measured"])]
    return [*lines, "", "whole step", *(target_lines(train_step) if train_step else ["not measured"])]


def _rows(path):
    return read_csv(path) if path and Path(path).exists() else []


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", help="CSV of bench.run")
    parser.add_argument("--memory", help="CSV of bench.memory")
    parser.add_argument("--train-step", help="CSV of bench.train_step")
    parser.add_argument("--tests", default="not run", help="how the tests ended: ok, FAILED, ... (default: not run)")
    options = parser.parse_args(argv)
    rows = (_rows(options.run), _rows(options.memory), _train_step_rows(_rows(options.train_step)))
    print("\n".join(report(*rows, options.tests)))
    return 0


def _train_step_rows(rows):
    """As bench.train_step has them in memory."""
    return [{**row, **{name: int(row[name]) for name in ("length", "batch", "pairs")}} for row in rows]


if __name__ == "__main__":
    sys.exit(main())
