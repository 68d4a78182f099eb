"""Statistics of every head of a model on harmful rows and on refusals: which heads lean on the sink, beyond chance.

Prints the counts of positive and negative heads with their significance, against the null (random halves of the
harmful rows), and with sequences of matched lengths. Writes into --output measurement.json, contrasts.csv,
divergence.csv (one line a head), measurement.npz (every sequence), figures, and report.html (self-contained; rows
appear by number, never their text).

    surgery measure --model demo --harmful harmful.jsonl --refusal refusals.jsonl --safe safe.jsonl --output measured
    surgery measure --model tuned --harmful harmful.jsonl --refusal refusals.jsonl \\
        --before measured/measurement.npz --runs runs/surgery --output after
"""

from pathlib import Path

from .flags import add_flags, picked, print_result, text_table


def add_arguments(parser):
    from ..config import SurgeryConfig

    parser.add_argument("--model", default="demo", help="folder, Hugging Face id, or demo")
    parser.add_argument("--harmful", required=True, help="JSON lines file or data set id of harmful rows")
    parser.add_argument("--refusal", required=True, help="the same of refusal rows")
    parser.add_argument("--safe", help="the same of a second reference, merely safe answers say")
    parser.add_argument("--paired", action="store_true", help="row i of every file answers the same prompt")
    parser.add_argument("--before", help="measurement.npz of an earlier checkpoint on the same rows, or a model")
    parser.add_argument("--runs", nargs="*", default=[], help="folders of `surgery train` runs, for curves")
    parser.add_argument("--output", help="folder for the results; without it they are only printed")
    parser.add_argument("--limit", type=int, help="rows of each side")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences a forward (default: 8)")
    parser.add_argument("--level", type=float, default=0.05, help="of tests; intervals are 1 - level (default: 0.05)")
    parser.add_argument("--resamples", type=int, default=2000, help="of the bootstrap (default: 2000)")
    parser.add_argument(
        "--length-tolerance", type=float, default=0.1, help="relative, of length-matched pairs (default: 0.1)"
    )
    add_flags(parser.add_argument_group("regulariser"), SurgeryConfig)


def run(arguments):
    import surgery_kernels as sk

    from ..config import SurgeryConfig
    from ..data import read_rows, rows_hash
    from ..measure import measure_sets
    from ..measurement_report import contrast_rows, contrasts_of, load_values, summary_of, write_measurement
    from ..models import load_model, pick_device
    from ..run_files import versions

    config = SurgeryConfig.from_preset(**{"preset": "paper", **picked(arguments, SurgeryConfig)})
    if not 0 < arguments.level < 0.5 or arguments.resamples < 100 or not 0 <= arguments.length_tolerance < 1:
        raise ValueError(
            f"--level must be in (0, 0.5), --resamples at least 100 and --length-tolerance in [0, 1), got "
            f"{arguments.level}, {arguments.resamples} and {arguments.length_tolerance}"
        )
    sources = {"harmful": arguments.harmful, "refusal": arguments.refusal}
    if arguments.safe:
        sources["safe"] = arguments.safe
    sets = {name: read_rows(source, arguments.limit) for name, source in sources.items()}
    if arguments.paired and len({len(rows) for rows in sets.values()}) > 1:
        raise ValueError(f"--paired needs as many rows in each set, got { {k: len(v) for k, v in sets.items()} }")
    histories = _histories(arguments.runs)
    settings = {
        "model": Path(arguments.model).name,
        "before": arguments.before and Path(arguments.before).name,
        "data": {name: rows_hash(rows) for name, rows in sets.items()},
        "limit": arguments.limit,
        "paired": arguments.paired,
        "level": arguments.level,
        "resamples": arguments.resamples,
        "length_tolerance": arguments.length_tolerance,
        "config": config.to_dict(),
        "versions": versions(),
    }

    def measured(name):
        model, tokenizer = load_model(name)
        return measure_sets(
            model.to(pick_device()),
            tokenizer,
            sets,
            config,
            batch_size=arguments.batch_size,
            stats=tuple(sk.STATS),
            progress=not arguments.json,
        )

    before = None
    if arguments.before:
        is_file = arguments.before.endswith(".npz")
        before = load_values(arguments.before, sets, settings) if is_file else measured(arguments.before)
    values = measured(arguments.model)
    contrasts = contrasts_of(
        values,
        arguments.paired,
        before,
        arguments.length_tolerance,
        level=arguments.level,
        resamples=arguments.resamples,
        seed=config.seed,
    )
    summary = summary_of(values, contrasts, arguments.level, config.seed)
    if arguments.output:
        write_measurement(arguments.output, values, contrasts, summary, settings, histories)
    header, rows = contrast_rows(summary)
    rows = [[f"{x:.4g}" if isinstance(x, float) else x for x in row] for row in rows]
    print_result(summary, arguments.json, text_table(header, rows))
    return 0


def _histories(folders):
    from ..run_files import HISTORY, read_history

    histories = {}
    for folder in folders:
        history = read_history(folder)
        if not history:
            raise ValueError(f"{folder}: no {HISTORY} with at least one step")
        histories[Path(folder).name] = history
    return histories
