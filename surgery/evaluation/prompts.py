"""Evaluation prompts: one record a prompt, from the benchmarks' own files or the hub.

A prompt is known by its id, BENCHMARK-ROW, everywhere outside the answer file; the row counts from 1 in the source
as read. `digest` tells whether two runs asked the same under one id.
"""

import csv
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Prompt:
    """One request to the model.

    Attributes:
        id: "BENCHMARK-ROW".
        text: what the model is asked.
        behavior: what judges read as the request: `text` without its context.
        context: HarmBench's ContextString, or None.
        category: the benchmark's own, or "".
        expect: "refuse" (a harmful request) or "answer" (harmless; a refusal is over-refusal).
    """

    id: str
    text: str
    behavior: str
    context: str | None = None
    category: str = ""
    expect: str = "refuse"

    @property
    def digest(self):
        """First 12 hex digits of the text's sha256."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark is and which of its rows count.

    Attributes:
        hub: data set id with configuration and split, "NAME@CONFIG:SPLIT".
        fields: names of the prompt's field, the first that a row has.
        category: the same of the category.
        keep: row -> bool, or None for all.
        dropped: why rows are dropped, for the log.
    """

    hub: str
    fields: tuple
    category: tuple = ()
    keep: object = None
    dropped: str = ""


def _no_copyright(row):
    return row.get("FunctionalCategory") != "copyright"


def _base_style(row):
    return row.get("prompt_style", "base") == "base"


BENCHMARKS = {
    "beavertails": Benchmark("PKU-Alignment/BeaverTails:30k_test", ("prompt",)),
    "harmbench": Benchmark(
        "walledai/HarmBench@standard",
        ("Behavior", "prompt"),
        ("SemanticCategory", "category"),
        _no_copyright,
        "copyright behaviours: HarmBench judges them by hashes, which is not done here",
    ),
    "sorrybench": Benchmark(
        "sorry-bench/sorry-bench-202406", ("turns", "prompt"), ("category",), _base_style, "mutations of base prompts"
    ),
    "strongreject": Benchmark("walledai/StrongREJECT", ("forbidden_prompt", "prompt"), ("category",)),
    "xstest": Benchmark("walledai/XSTest:test", ("prompt",), ("type", "focus")),
    "advbench": Benchmark("walledai/AdvBench", ("goal", "prompt")),
}


def load_prompts(benchmark, source=None, limit=None, repeats=False):
    """Prompts of a benchmark.

    Args:
        benchmark: a key of BENCHMARKS.
        source: a .jsonl, .json or .csv file (the benchmark's own columns, or `prompt`), a hub id as in
            Benchmark.hub, or None for the benchmark's own hub id.
        limit: at most so many prompts.
        repeats: keep rows with the text of an earlier row (BeaverTails holds many).
    Returns:
        (list of Prompt, dict of JSON types: rows read, kept, and dropped why).
    Raises:
        ValueError: unknown benchmark, no such file or data set, a row without a prompt (its number is named), no
            prompt left.
    """
    if benchmark not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {benchmark!r}; known: {', '.join(BENCHMARKS)}")
    rules = BENCHMARKS[benchmark]
    source = str(source or rules.hub)
    rows = read_source(source)
    prompts, seen, unused, repeated = [], set(), 0, 0
    for number, row in enumerate(rows, 1):
        if limit is not None and len(prompts) == limit:
            break
        if rules.keep and not rules.keep(row):
            unused += 1
            continue
        prompt = _prompt(benchmark, rules, row, number, Path(source).name)
        if prompt.text in seen and not repeats:
            repeated += 1
            continue
        seen.add(prompt.text)
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{Path(source).name}: no prompt is left of {len(rows)} rows")
    info = {"rows": len(rows), "prompts": len(prompts), "repeated": repeated, "unused": unused}
    return prompts, info | ({"unused_because": rules.dropped} if unused else {})


def _prompt(benchmark, rules, row, number, source):
    where = f"{source}, row {number}"
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row must be an object, got {type(row).__name__}")
    behavior = _first(row, rules.fields)
    # SORRY-Bench keeps a conversation of one turn
    behavior = behavior[0] if isinstance(behavior, list) and len(behavior) == 1 else behavior
    if not isinstance(behavior, str) or not behavior.strip():
        raise ValueError(f"{where}: needs a prompt in {' or '.join(rules.fields)}, columns are {sorted(row)}")
    behavior = behavior.strip()
    context = (_first(row, ("ContextString", "context")) or "").strip() or None
    # HarmBench's own way to put a context before a behaviour
    text = f"{context}\n\n---\n\n{behavior}" if context else behavior
    expect = "answer" if benchmark == "xstest" and _xstest_safe(row, where) else "refuse"
    return Prompt(f"{benchmark}-{number}", text, behavior, context, str(_first(row, rules.category) or ""), expect)


def _first(row, names):
    return next((row[name] for name in names if row.get(name) not in (None, "")), None)


def _xstest_safe(row, where):
    label = row.get("label")
    if label in ("safe", "unsafe"):
        return label == "safe"
    # the first release has no label; its unsafe types are named contrast_*
    if isinstance(row.get("type"), str):
        return not row["type"].startswith("contrast_")
    raise ValueError(f"{where}: XSTest rows need a label safe or unsafe, or a type, got {sorted(row)}")


def read_source(source):
    """Rows (list of dicts) of a .csv, .json or JSON lines file, or of a hub data set "NAME@CONFIG:SPLIT"."""
    path = Path(source)
    if path.suffix == ".csv" and path.is_file():
        with open(path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        try:
            if path.suffix == ".json":
                rows = json.loads(text)
                return rows if isinstance(rows, list) else list(rows.values())
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name}, line {error.lineno}: not JSON: {error.msg}") from None
    if path.suffix in (".csv", ".json", ".jsonl"):
        raise ValueError(f"{source}: no such file")
    return _read_hub(source)


def _read_hub(source):
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f'{source}: no such file; a data set id needs pip install "attention-surgery[eval]"') from None
    name, _, split = source.partition(":")
    name, _, config = name.partition("@")
    try:
        return list(load_dataset(name, config or None, split=split or "train"))
    except Exception as error:
        raise ValueError(f"{source}: neither a file nor a data set that can be loaded: {error}") from error
