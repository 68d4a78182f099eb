"""Times of attention with sink mass: every implementation on the same tensors, checked first, interleaved.

    python -m bench.run --shapes smollm2-135m --lengths 256,1024 --csv run.csv
    python -m bench.run --list

Metrics of the CSV (p50, p20, p80 over the repetitions):
    correctness     largest error over the allowed one (check.py); unit pass or red. A red row has no time.
    time            s of `mode`: forward (with autograd where there is a backward), backward alone, or both
    throughput      TFLOP/s, useful operations (shapes.py) over the time
    of_ceiling      %, throughput over that of a large matrix product, measured in the same run
    host_time       s the CPU needs to queue forward and backward (GPU only; not part of time)
The row of impl `matmul` is that matrix product. A row of unit oom, error or unsupported has no value; note says why.
"""

import argparse
import sys

import torch

from .arguments import lengths, names, one_length
from .check import Truth
from .implementations import IMPLEMENTATIONS
from .out_of_memory import is_out_of_memory, limit_memory, release
from .problem import make_problem
from .records import ENVIRONMENT, VALUES, environment, quantiles, run_id, write_csv
from .runner import Runner
from .shapes import DTYPES, KINDS, SHAPES, case_for
from .timing import MODES, input_sets, matmul_ceiling, measure

KEY = ("impl", "task", "mode", "shape", "kind", "length", "batch", "dtype", "metric")
COLUMNS = (*KEY, "unit", *VALUES, "repetitions", "note", *ENVIRONMENT, "run")
TASKS = ("attention", "column_mass")
MATMUL = "matmul"


def row_of(case, impl, task, metric, unit, values=(), mode="", note=""):
    """One row as a dict, without the columns of the environment and the run."""
    p50, p20, p80 = quantiles(values) if values else ("", "", "")
    problem = (impl, task, mode, case.shape, case.kind, case.length, case.batch, case.dtype, metric)
    measured = {"unit": unit, "p50": p50, "p20": p20, "p80": p80, "repetitions": len(values) or "", "note": note}
    return {**dict(zip(KEY, problem, strict=True)), **measured}


def check_and_build(case, implementations, device, log=print):
    """Check every implementation that can run.

    Args:
        implementations: list of Implementation.
        log: gets the whole message when one raises.
    Returns:
        (rows of the wrong, failed and unsupported ones and of every check, name -> Runner of the right ones).
    """
    rows, runners, problems, truth = [], {}, [], None
    for entry in implementations:
        reasons = entry.unsupported_reasons(case, device)
        if reasons:
            rows.append(row_of(case, entry.name, entry.task, "time", "unsupported", note="; ".join(reasons)))
            continue
        if truth is None:
            # only for a case that something can run
            problems = [make_problem(case, device)]
            while len(problems) < input_sets(problems[0].nbytes(), device):
                problems.append(make_problem(case, device, seed=len(problems)))
            truth = Truth(problems[0])
        errors = None
        try:
            runner = Runner(entry, case, device, problems)
            errors = truth.errors(runner.results(), entry.factor, entry.exact_statistics)
        except Exception as error:
            # a peer may fail in any way: that is its row and not the end of the run
            unit = "oom" if is_out_of_memory(error) else "error"
            rows.append(row_of(case, entry.name, entry.task, "time", unit, note=type(error).__name__))
            if unit == "error":
                log(f"{entry.name} on {case}: {type(error).__name__}: {error}")
        if errors is None:
            # outside the handler: the traceback no longer holds the tensors
            release(device)
            continue
        name, worst = max(errors.items(), key=lambda item: item[1])
        note = f"worst: {name}; {len(truth.groups)} of {truth.total} groups of heads"
        unit = "pass" if worst <= 1.0 else "red"
        rows.append(row_of(case, entry.name, entry.task, "correctness", unit, [worst], note=note))
        if worst <= 1.0:
            runners[entry.name] = runner
    return rows, runners


def time_rows(case, entry, times, ceiling):
    """Rows of one implementation's Times (None: it ran out of memory); ceiling in FLOP/s."""

    def row(*args, **kwargs):
        return row_of(case, entry.name, entry.task, *args, **kwargs)

    if times is None:
        return [row("time", "oom")]
    rows = []
    for mode in MODES:
        seconds = getattr(times, mode)
        if not seconds:
            continue
        rows.append(row("time", "s", seconds, mode))
        if entry.task == "attention":
            rates = [case.flops(mode) / s for s in seconds]
            rows.append(row("throughput", "TFLOP/s", [rate / 1e12 for rate in rates], mode))
            rows.append(row("of_ceiling", "%", [100 * rate / ceiling for rate in rates], mode))
    return rows + ([row("host_time", "s", times.host)] if times.host else [])


def measure_case(case, implementations, device, ceiling, repetitions=20, seconds=10.0, log=print):
    """All rows of one case: correctness, then times of the right ones."""
    rows, runners = check_and_build(case, implementations, device, log)
    release(device)
    for name, times in measure(runners, device, repetitions, seconds).items():
        rows += time_rows(case, runners[name].implementation, times, ceiling)
    return rows


def table(case, rows):
    """One case as text: a line an implementation, fastest first."""
    lines = [
        f"\n{case.shape}  {case.kind}  {case.length} tokens  batch {case.batch}  {case.dtype}",
        f"{'implementation':20}{'fwd ms':>10}{'bwd ms':>10}{'both ms':>10}{'p20':>10}{'p80':>10}"
        f"{'fwd TF/s':>10}{'bwd TF/s':>10}{'% ceil':>8}{'error':>8}",
    ]
    unsupported = [row["impl"] for row in rows if row["unit"] == "unsupported"]
    for name in sorted({row["impl"] for row in rows} - set(unsupported), key=lambda name: _seconds(rows, name)):
        cells = {(row["metric"], row["mode"]): row for row in rows if row["impl"] == name}
        failed = next((row for row in cells.values() if row["unit"] in ("oom", "error")), None)
        error = cells.get(("correctness", ""))
        if failed:
            lines.append(f"{name:20}{failed['unit']:>10}  {failed['note']}")
        elif error["unit"] == "red":
            lines.append(f"{name:20}{'RED':>10}  error {error['p50']:.3g} times the allowed one, {error['note']}")
        else:
            longest = cells.get(("time", "both"), cells[("time", "forward")])
            ceiling = cells.get(("of_ceiling", longest["mode"]))
            numbers = [_cell(cells.get(("time", mode)), 1e3, ".3f") for mode in MODES]
            numbers += [f"{longest[q] * 1e3:.3f}" for q in ("p20", "p80")]
            numbers += [_cell(cells.get(("throughput", mode)), 1, ".4g") for mode in MODES[:2]]
            line = f"{name:20}" + "".join(f"{number:>10}" for number in numbers)
            lines.append(f"{line}{_cell(ceiling, 1, '.1f'):>8}{_cell(error, 1, '.2f'):>8}")
    if unsupported:
        lines.append(f"cannot run this: {', '.join(unsupported)} (--list says why)")
    return "\n".join(lines)


def _seconds(rows, name):
    found = [row["p50"] for row in rows if row["impl"] == name and row["metric"] == "time" and row["p50"] != ""]
    return (max(found, default=float("inf")), name)


def _cell(row, scale, form):
    return "-" if row is None else f"{row['p50'] * scale:{form}}"


def add_case_arguments(parser):
    """Flags that choose cases and implementations, shared with bench.memory."""
    add = parser.add_argument
    add("--shapes", default="smollm2-135m", type=names(SHAPES), help=f"out of {', '.join(SHAPES)}")
    add("--lengths", default="256,512,1024", type=lengths, help="tokens of a sequence; 4k is 4096")
    add("--kinds", default="causal", type=names(KINDS), help=f"out of {', '.join(KINDS)}")
    add("--dtype", default="bfloat16", choices=DTYPES)
    add("--tokens", type=one_length, help="tokens of a case in all: sets the batch size")
    add("--batch", default=1, type=int, help="sequences of a case (default: 1)")
    add("--impls", type=names(IMPLEMENTATIONS), help="implementations (default: all but the oracle and the autotuned)")
    add("--task", default="attention", choices=TASKS)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    add("--csv", help="file that the rows are appended to")


def chosen_implementations(options):
    """The entries of --impls, or all default ones of the task."""
    entries = [IMPLEMENTATIONS[name] for name in options.impls] if options.impls else IMPLEMENTATIONS.values()
    wrong = [entry.name for entry in entries if options.impls and entry.task != options.task]
    if wrong:
        raise ValueError(f"task {options.task} does not know {', '.join(wrong)}")
    return [entry for entry in entries if entry.task == options.task and (options.impls or entry.default)]


def cases(options):
    """Cases of the flags, in their order."""
    return [
        case_for(shape, length, options.tokens, options.batch, kind, options.dtype)
        for shape in options.shapes
        for kind in options.kinds
        for length in options.lengths
    ]


def list_implementations(case, device):
    """The table of implementations as text, with the reasons against each on `case`."""
    lines = []
    for entry in IMPLEMENTATIONS.values():
        lines.append(f"{entry.name:20}{entry.task:13}{entry.what}{'' if entry.default else ' (only by name)'}")
        lines += [f"{'':20}cannot run: {reason}" for reason in entry.unsupported_reasons(case, device)]
    return "\n".join(lines)


def main(argv=None):
    """Returns 0, or 1 when an implementation is wrong or raised."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_case_arguments(parser)
    parser.add_argument("--repetitions", default=20, type=int)
    parser.add_argument("--seconds", default=10.0, type=float, help="no new round of a case after this time")
    parser.add_argument("--list", action="store_true", help="print the implementations, why one cannot run, and stop")
    options = parser.parse_args(argv)
    if options.repetitions < 1:
        parser.error(f"--repetitions must be at least 1, got {options.repetitions}")
    try:
        todo, implementations = cases(options), chosen_implementations(options)
    except ValueError as error:
        parser.error(str(error))
    if options.list:
        print(list_implementations(todo[0], options.device))
        return 0
    if options.device == "cpu":
        limit_memory()
    known = {**environment(options.device), "run": run_id()}
    dtype = todo[0].torch_dtype
    ceiling = matmul_ceiling(dtype, options.device)
    print(
        f"{known['device']}, torch {known['torch']}, triton {known['triton']}; matmul {ceiling[0] / 1e12:.4g} TFLOP/s"
    )
    product = row_of(todo[0], MATMUL, "", "throughput", "TFLOP/s", [rate / 1e12 for rate in ceiling])
    product |= {name: "" for name in ("shape", "kind", "length", "batch")}
    if options.csv:
        write_csv(options.csv, [{**product, **known}], COLUMNS)
    wrong = False
    for case in todo:
        rows = measure_case(case, implementations, options.device, ceiling[0], options.repetitions, options.seconds)
        print(table(case, rows), flush=True)
        wrong = wrong or any(row["unit"] in ("red", "error") for row in rows)
        if options.csv:
            write_csv(options.csv, [{**row, **known} for row in rows], COLUMNS)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
