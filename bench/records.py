"""What every tool writes: quantiles, CSV files, and the environment that a row was measured in."""

import csv
import importlib.metadata
import os
import re
import statistics
import subprocess
from datetime import datetime, timezone
from pathlib import Path

ENVIRONMENT = ("device", "driver", "torch", "triton", "transformers", "commit", "date")
VALUES = ("p50", "p20", "p80")


def quantiles(values):
    """(p50, p20, p80), linear between the order statistics."""
    if len(values) == 1:
        return (values[0],) * 3
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return statistics.median(values), cuts[1], cuts[7]


def write_csv(path, rows, columns):
    """Append `rows` to the CSV at `path`, with a header when it is new.

    Raises:
        ValueError: the file has other columns.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size:
        header = path.read_text(encoding="utf-8").splitlines()[0].split(",")
        if header != list(columns):
            raise ValueError(f"{path} has columns {header}, expected {list(columns)}: move it away")
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        for row in rows:
            numbers = {k: f"{row[k]:.6g}" for k in VALUES if row[k] != ""}
            writer.writerow({**row, **numbers})


def read_csv(path):
    """Rows as dicts; p50, p20 and p80 are floats, or "" in a row without a value.

    Raises:
        ValueError: not one of our CSV files.
    """
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if not set(VALUES) <= set(row):
            raise ValueError(f"{path} must have the columns {', '.join(VALUES)}, got {', '.join(row)}")
        row.update({name: float(row[name]) if row[name] else "" for name in VALUES})
    return rows


def environment(device):
    """The columns of ENVIRONMENT; no host name, no path."""
    # not at the top: the tools that only read CSVs start in no time
    import torch

    return {
        "device": _device_name(device, torch),
        "driver": _driver() if device == "cuda" else "",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def run_id():
    """A name for one run: ratios are taken only between rows that share it."""
    return datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S")


def _device_name(device, torch):
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{name[1].strip() if name else 'CPU'} ({torch.get_num_threads()} of {os.cpu_count()} cores)"


def _driver():
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return _output(query).split("\n")[0]


def _commit():
    # a checkout without git, on a borrowed machine: whoever copied it may say what it was
    if os.environ.get("BENCH_COMMIT"):
        return os.environ["BENCH_COMMIT"]
    here = Path(__file__).parent
    commit = _output(["git", "-C", str(here), "rev-parse", "--short", "HEAD"])
    changed = _output(["git", "-C", str(here), "status", "--porcelain", "--untracked-files=no"])
    return commit + ("-dirty" if commit and changed else "")


def _output(command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
