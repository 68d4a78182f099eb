"""The steps of an evaluation: answer, judge, score, compare, write. What `surgery eval` and experiments call."""

import csv
import json
from pathlib import Path

from ..run_files import write_json
from .answers import answer_prompts
from .disjoint import overlaps, prompt_texts
from .judge import Exchange
from .scores import compare_scores, records_of, score_verdicts

SCORES = "scores.json"


def judge_answers(prompts, answers, judge):
    """Records (see scores.py) of one judge on answers to prompts, in order."""
    exchanges = [
        Exchange(prompt.text, answer, prompt.context, prompt.behavior)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return records_of(prompts, answers, judge.judge(exchanges))


def answer_sets(model, tokenizer, sets, folder, name, progress=False, **generation):
    """Answer the prompts of every set into FOLDER/answers/BENCHMARK.jsonl, continuing where an earlier call stopped.

    Args:
        model, tokenizer: the model to evaluate.
        sets: dict benchmark -> list of Prompt.
        folder: results; only its answers/ holds texts.
        name: of the model, as results and the answer file call it.
        generation: of `generate_answers`: max_new_tokens, batch_size, template, system.
    Returns:
        dict benchmark -> list of str.
    """
    folder = Path(folder)
    return {
        benchmark: answer_prompts(
            model,
            tokenizer,
            prompts,
            folder / "answers" / f"{benchmark}.jsonl",
            {"model": name},
            progress=progress,
            **generation,
        )
        for benchmark, prompts in sets.items()
    }


def evaluate_tasks(model, tokenizer, sources, folder, **options):
    """Task accuracy through lm-eval (see `tasks_lm_eval.task_records`), as scores of the judge "lm-eval"."""
    from .tasks_lm_eval import task_records

    scores = {}
    for task, records in task_records(model, tokenizer, sources, **options).items():
        _write_lines(Path(folder, "verdicts", f"{task}.lm-eval.jsonl"), records)
        scores[task] = {"lm-eval": score_verdicts(records)}
    return scores


def judge_all(sets, answers, judges, folder):
    """Judge answers and write FOLDER/verdicts/BENCHMARK.JUDGE.jsonl, ids and labels without texts.

    Args:
        sets: dict benchmark -> list of Prompt; answers: dict benchmark -> list of str, in the same order.
        judges: iterable of Judge. A generator may load them one by one: each is let go before the next is asked for.
        folder: results.
    Returns:
        dict benchmark -> judge -> scores (see `score_verdicts`).
    """
    folder = Path(folder)
    scores = {benchmark: {} for benchmark in sets}
    for judge in judges:
        for benchmark, prompts in sets.items():
            records = judge_answers(prompts, answers[benchmark], judge)
            _write_lines(folder / "verdicts" / f"{benchmark}.{judge.name}.jsonl", records)
            scores[benchmark][judge.name] = score_verdicts(records)
        # before the next one is loaded
        del judge
    return scores


def read_verdicts(folder):
    """Records of every verdicts/BENCHMARK.JUDGE.jsonl: dict (benchmark, judge) -> list of records.

    Raises:
        ValueError: none there.
    """
    found = {}
    for path in sorted(Path(folder, "verdicts").glob("*.jsonl")):
        benchmark, judge = path.stem.split(".", 1)
        lines = path.read_text(encoding="utf-8").splitlines()
        found[benchmark, judge] = [json.loads(line) for line in lines]
    if not found:
        raise ValueError(f"{folder}: no verdicts there; it must be the --output of another surgery eval")
    return found


def compare_folders(before, after):
    """Paired differences of two evaluations: dict benchmark -> judge -> see `compare_scores`.

    Raises:
        ValueError: nothing in common.
    """
    earlier, later = read_verdicts(before), read_verdicts(after)
    common = [key for key in later if key in earlier]
    if not common:
        raise ValueError(f"{before}: holds {sorted(earlier)}, nothing of {sorted(later)}")
    compared = {}
    for benchmark, judge in common:
        one, other = earlier[benchmark, judge], later[benchmark, judge]
        compared.setdefault(benchmark, {})[judge] = compare_scores(one, other)
    return compared


def check_disjoint(sets, others):
    """Prompts that are among the rows of training or probe files, or in two sets.

    Args:
        sets: dict benchmark -> list of Prompt.
        others: dict name -> rows as `data.read_rows` gives them.
    Returns:
        dict (benchmark, other name) -> sorted ids; only pairs that overlap.
    """
    texts = {name: [text for row in rows for text in prompt_texts(row)] for name, rows in others.items()}
    names = list(sets)
    found = {}
    for i, benchmark in enumerate(names):
        mine = {prompt.id: prompt.text for prompt in sets[benchmark]}
        against = texts | {name: [prompt.text for prompt in sets[name]] for name in names[:i]}
        for name, rows in against.items():
            ids = sorted(overlaps(mine, rows))
            if ids:
                found[benchmark, name] = ids
    return found


def write_scores(folder, scores, extra):
    """scores.json with `extra` beside the scores, and scores.csv: benchmark, judge, expect, rate, low, high, n."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SCORES, {"scores": scores, **extra})
    with open(folder / "scores.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("benchmark", "judge", "prompts", "quantity", "rate", "low", "high", "n"))
        writer.writerows(score_rows(scores))


def score_rows(scores):
    """Rows of scores.csv."""
    return [
        (benchmark, judge, expect, name, *(f"{rate[key]:.6g}" for key in ("rate", "low", "high")), rate["n"])
        for benchmark, by_judge in scores.items()
        for judge, groups in by_judge.items()
        for expect, rates in groups.items()
        for name, rate in rates.items()
        if isinstance(rate, dict)
    ]


def _write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
