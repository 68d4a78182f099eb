"""Safety of a model's answers: benchmark prompts, greedy answers, judges, rates with intervals; and task accuracy.

Prompts come from the benchmarks' own files (--prompts strongreject=strongreject.csv) or their hub ids. Judges: string
(phrase rules, refusals only; the default), beaver-dam, harmbench, sorry-bench, strongreject, llama-guard, wildguard,
each with its published weights (--judge harmbench) or yours (--judge harmbench=FOLDER). Writes into --output
answers/ (texts, continued after a kill), verdicts/ (ids and labels), scores.json and scores.csv.

    surgery eval --model demo --prompts strongreject=strongreject.jsonl --prompts xstest=xstest.csv --output before
    surgery eval --model tuned --prompts strongreject=strongreject.jsonl --prompts xstest=xstest.csv \\
        --unseen train.jsonl probes.jsonl --against before --output after
    surgery eval --model tuned --tasks gsm8k=test.jsonl --output after
    surgery eval --check-judge labelled.jsonl --judge string
"""

from pathlib import Path

from .flags import print_result, text_table


def add_arguments(parser):
    from ..generate import TEMPLATES
    from ..models import DTYPES

    parser.add_argument("--model", help="folder, Hugging Face id, or demo")
    parser.add_argument(
        "--prompts", action="append", default=[], metavar="BENCHMARK[=SOURCE]", help="again for each benchmark"
    )
    parser.add_argument("--judge", action="append", default=[], metavar="NAME[=MODEL]", help="again for each judge")
    parser.add_argument("--judge-template", help="text file in the place of the judges' published prompt")
    parser.add_argument(
        "--judge-dtype", default="float32", choices=DTYPES, help="of judges' weights (default: float32)"
    )
    parser.add_argument("--tasks", action="append", default=[], metavar="TASK=FILE", help="gsm8k, sst2 or agnews")
    parser.add_argument("--output", help="folder of the results")
    parser.add_argument("--against", help="--output of another evaluation: paired differences, this minus that")
    parser.add_argument("--unseen", nargs="*", default=[], help="training and probe files that no prompt may be in")
    parser.add_argument("--drop-seen", action="store_true", help="leave such prompts out instead of stopping")
    parser.add_argument("--limit", type=int, help="prompts of each benchmark and rows of each task")
    parser.add_argument("--keep-repeats", action="store_true", help="keep prompts that a benchmark holds twice")
    parser.add_argument("--template", default="chat", choices=TEMPLATES, help="how the model is asked (default: chat)")
    parser.add_argument("--system", help="system turn of the chat template")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer (default: 512)")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts a forward (default: 8)")
    parser.add_argument(
        "--check-judge", metavar="FILE", help="only measure the judges on rows with response and refusal or harmful"
    )


def run(arguments):
    if arguments.check_judge:
        return _check_judges(arguments)
    from ..evaluation.evaluate import answer_sets, compare_folders, evaluate_tasks, judge_all, score_rows, write_scores
    from ..models import load_model, pick_device

    if not arguments.model or not arguments.output or not (arguments.prompts or arguments.tasks):
        raise ValueError("give --model, --output, and --prompts or --tasks; or --check-judge")
    for name, value in (("--limit", arguments.limit), ("--batch-size", arguments.batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    sets, info = _prompt_sets(arguments)
    tasks = dict(_named(spec, "--tasks") for spec in arguments.tasks)
    model, tokenizer = load_model(arguments.model)
    model.to(pick_device())
    progress = not arguments.json
    result = {"model": Path(arguments.model).name, "prompts": info}
    options = {"max_new_tokens": arguments.max_new_tokens, "batch_size": arguments.batch_size}
    answers = answer_sets(
        model,
        tokenizer,
        sets,
        arguments.output,
        result["model"],
        progress=progress,
        template=arguments.template,
        system=arguments.system,
        **options,
    )
    on_tasks = {}
    if tasks:
        on_tasks = evaluate_tasks(model, tokenizer, tasks, arguments.output, limit=arguments.limit, **options)
    # judges may need the memory
    del model
    scores = judge_all(sets, answers, _judges(arguments) if sets else (), arguments.output) | on_tasks
    if arguments.against:
        result["against"] = compare_folders(arguments.against, arguments.output)
    write_scores(arguments.output, scores, result)
    text = text_table(("benchmark", "judge", "prompts", "quantity", "rate", "low", "high", "n"), score_rows(scores))
    print_result({"scores": scores, **result}, arguments.json, text + _differences(result.get("against")))
    return 0


def _prompt_sets(arguments):
    """(dict benchmark -> prompts, dict benchmark -> how many were read and kept), checked against --unseen."""
    from ..data import read_rows
    from ..evaluation.evaluate import check_disjoint
    from ..evaluation.prompts import load_prompts

    sets, info = {}, {}
    for spec in arguments.prompts:
        benchmark, _, source = spec.partition("=")
        if benchmark in sets:
            raise ValueError(f"--prompts {benchmark}: given twice")
        sets[benchmark], info[benchmark] = load_prompts(
            benchmark, source or None, arguments.limit, arguments.keep_repeats
        )
    seen = check_disjoint(sets, {Path(path).name: read_rows(path) for path in arguments.unseen})
    for (benchmark, other), ids in seen.items():
        if not arguments.drop_seen:
            raise ValueError(
                f"{len(ids)} prompts of {benchmark} are also in {other}, word for word or nearly: "
                f"{', '.join(ids[:5])}{', ...' if len(ids) > 5 else ''}. --drop-seen leaves them out"
            )
        sets[benchmark] = [prompt for prompt in sets[benchmark] if prompt.id not in ids]
        info[benchmark].setdefault("seen", {})[other] = len(ids)
    empty = [benchmark for benchmark, prompts in sets.items() if not prompts]
    if empty:
        raise ValueError(f"no prompt of {', '.join(empty)} is unseen")
    return sets, info


def _judges(arguments):
    """The judges, loaded one at a time."""
    from ..evaluation.judge import load_judge

    for spec in arguments.judge or ["string"]:
        yield load_judge(spec, arguments.batch_size, arguments.judge_dtype, arguments.judge_template)


def _named(spec, flag):
    name, _, value = spec.partition("=")
    if not value:
        raise ValueError(f"{flag} needs NAME=FILE, got {spec!r}")
    return name, value


def _differences(against):
    if not against:
        return ""
    rows = [
        (benchmark, judge, expect, name, *(f"{x[key]:+.4g}" for key in ("difference", "low", "high")), x["n"])
        for benchmark, by_judge in against.items()
        for judge, groups in by_judge.items()
        for expect, rates in groups.items()
        for name, x in rates.items()
    ]
    header = ("benchmark", "judge", "prompts", "quantity", "difference", "low", "high", "n")
    return "\n\n" + text_table(header, rows)


def _check_judges(arguments):
    """Precision, recall and accuracy of every --judge on labelled rows."""
    from ..evaluation.judge import Exchange
    from ..evaluation.prompts import read_source
    from ..evaluation.scores import judge_quality
    from ..run_files import write_json

    rows = read_source(arguments.check_judge)[: arguments.limit]
    key = next((key for key in ("refusal", "harmful") if rows and isinstance(rows[0].get(key), bool)), None)
    if key is None:
        raise ValueError(
            f"{Path(arguments.check_judge).name}: rows need response, and refusal or harmful: true or false"
        )
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get(key), bool) or not isinstance(row.get("response"), str):
            raise ValueError(
                f"{Path(arguments.check_judge).name}, row {number}: needs response, and {key}: true or false"
            )
    exchanges = [Exchange(row.get("prompt", ""), row["response"]) for row in rows]
    found = {}
    for judge in _judges(arguments):
        records = [vars(verdict) for verdict in judge.judge(exchanges)]
        found[judge.name] = judge_quality(records, [row[key] for row in rows], key)
    result = {"label": key, "rows": len(rows), "judges": found}
    if arguments.output:
        Path(arguments.output).mkdir(parents=True, exist_ok=True)
        write_json(Path(arguments.output, "judge_quality.json"), result)
    table = [
        (name, quantity, *(f"{one[quantity][k]:.3f}" for k in ("rate", "low", "high")), one[quantity]["n"])
        for name, one in found.items()
        for quantity in ("precision", "recall", "accuracy")
        if one[quantity]
    ]
    print_result(result, arguments.json, text_table(("judge", f"of {key}", "rate", "low", "high", "n"), table))
    return 0
