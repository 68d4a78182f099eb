"""The tests first, then the times; no speed-up is printed while a test is red.

    python -m bench.verify -- --shapes smollm2-135m --lengths 1024

Arguments after -- go to bench.run. Exit status: of the tests, of the run, or 1 when an implementation is wrong.
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from . import run
from .records import read_csv
from .targets import on_off_lines, peer_lines

ROOT = Path(__file__).parent.parent
TESTS = {
    "cuda": "tests/ops tests/bench/test_check.py",
    "cpu": "tests/ops/test_flash_attn_stats.py tests/ops/test_varlen.py tests/bench/test_check.py",
}


def run_tests(tests):
    """(exit status, output) of pytest on `tests`."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", *tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def main(argv=None, run_tests=run_tests):
    """Returns 0, or the status of what failed first."""
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = TESTS["cuda" if torch.cuda.is_available() else "cpu"]
    parser.add_argument("--tests", default=default, help=f"what pytest gets, in one string (default: {default})")
    options = parser.parse_args(argv[:cut])
    status, output = run_tests(shlex.split(options.tests))
    if status:
        print(output[-4000:])
        print("the tests are red: nothing is timed and no speed-up is printed")
        return status
    print(output.strip().splitlines()[-1])
    rest = argv[cut + 1 :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.csv"
        status = run.main([*rest, "--csv", str(path)])
        rows = read_csv(path)
    print("\nspeed-ups, from this run")
    print("\n".join([*on_off_lines(rows), *peer_lines(rows)]))
    return status


if __name__ == "__main__":
    sys.exit(main())
