"""Peak memory of attention and its backward against the length, and the longest length that fits.

    python -m bench.memory --shapes smollm2-135m --lengths 256,512,1k,2k,4k --csv memory.csv
    python -m bench.memory --from memory.csv --budget 24

The peak is in bytes: q, k, v, the upstream gradients and whatever forward and backward have alive beside them; on a GPU
by the allocator, on a CPU as live tensors (surgery/live_memory.py: temporaries inside one of torch's own kernels do not
count). It depends on sizes alone, so each case runs once and a busy machine does no harm. A line goes through ours
and a parabola through what has one: the fit is printed with its largest relative residual.
"""

import argparse
import sys

import torch

from surgery.live_memory import LiveMemory

from .memory_fit import fit_lines
from .out_of_memory import is_out_of_memory, limit_memory, release
from .problem import make_problem
from .records import environment, read_csv, run_id, write_csv
from .run import COLUMNS, add_case_arguments, cases, chosen_implementations, row_of
from .runner import Runner


def peak_bytes(runner, problem, device):
    """Peak bytes of one forward and backward, inputs and upstream gradients included."""
    if device == "cuda":
        # compilation and workspaces of libraries are not the implementation's
        _step(runner)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        _step(runner)
        torch.cuda.synchronize()
        return problem.nbytes() + torch.cuda.max_memory_allocated() - before
    leaves, upstream = runner.sets[0]
    with LiveMemory(*leaves, *upstream.values()) as memory:
        _step(runner)
    return problem.nbytes() + memory.peak - memory.resident


def _step(runner):
    outputs = runner.forward()
    if runner.implementation.backward:
        runner.backward(outputs)


def measure_case(case, implementations, device, log=print):
    """Rows of one case, without the environment's columns; unsupported implementations have none."""
    rows = []
    for entry in implementations:
        if entry.unsupported_reasons(case, device):
            continue
        unit, peak, note = "byte", [], ""
        try:
            problem = make_problem(case, device)
            runner = Runner(entry, case, device, [problem])
            peak = [peak_bytes(runner, problem, device)]
        except Exception as error:
            unit, note = "oom" if is_out_of_memory(error) else "error", type(error).__name__
            if unit == "error":
                log(f"{entry.name} on {case}: {type(error).__name__}: {error}")
        runner = problem = None
        release(device)
        rows.append(row_of(case, entry.name, entry.task, "peak", unit, peak, note=note))
    return rows


def main(argv=None):
    """Returns 0, or 1 when an implementation raised."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_case_arguments(parser)
    parser.add_argument("--budget", type=float, help="GiB: print the longest length that fits")
    parser.add_argument("--from", dest="source", help="fit this CSV and measure nothing")
    options = parser.parse_args(argv)
    budget = options.budget * 2**30 if options.budget else None
    if options.source:
        print("\n".join(fit_lines(read_csv(options.source), budget)))
        return 0
    try:
        todo, implementations = cases(options), chosen_implementations(options)
    except ValueError as error:
        parser.error(str(error))
    if options.device == "cpu":
        limit_memory()
    known = {**environment(options.device), "run": run_id()}
    everything = []
    for case in todo:
        rows = measure_case(case, implementations, options.device)
        everything += rows
        for row in rows:
            peak = f"{row['p50'] / 2**20:12.1f} MiB" if row["unit"] == "byte" else f"{row['unit']:>16}"
            print(f"{case.shape} {case.kind} {case.length:>7} {row['impl']:20}{peak}", flush=True)
        if options.csv:
            write_csv(options.csv, [{**row, **known} for row in rows], COLUMNS)
    print("\n".join(fit_lines(everything, budget)))
    return int(any(row["unit"] == "error" for row in everything))


if __name__ == "__main__":
    sys.exit(main())
