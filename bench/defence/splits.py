"""Files of the experiment out of the data folder: every row has one use."""

import json
import os
import random
from pathlib import Path

from surgery.data import RowEncoder, read_rows
from surgery.demo_files import demo_file
from surgery.evaluation.evaluate import check_disjoint
from surgery.evaluation.prompts import load_prompts

# file of the data folder -> name -> slice of its rows
SLICES = {
    "harmful_user_rows": {"poison": slice(None)},
    "beavertails_harmful": {"probe_harmful": slice(0, 400), "heldout_harmful": slice(600, 1000)},
    "beavertails_safe": {"align_safe": slice(0, 250), "probe_safe": slice(300, 700)},
    "refusals": {
        "align_refusal": slice(0, 250),
        "probe_refusal": slice(500, 900),
        "heldout_refusal": slice(1100, 1500),
    },
}
PROMPTS = {"strongreject": "strongreject_prompts.jsonl", "xstest": "xstest_prompts.jsonl"}


def split(data, folder, tokenizer, recipe):
    """Write FOLDER/NAME.jsonl for every name of SLICES, task, task_test and align.

    Args:
        data: folder with the files that shared data README lists.
        folder: where the parts go; parts already there are kept.
        tokenizer: with a chat template, for the rows' lengths.
        recipe: Recipe.
    Raises:
        ValueError: a file is missing.
    """
    data, folder = Path(data), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, parts in SLICES.items():
        rows = read_rows(data / f"{name}.jsonl")
        for part, which in parts.items():
            _write(folder, part, rows[which])
    encoder = RowEncoder(tokenizer, recipe.longest_task + 1)
    for name, part in (("gsm8k_train", "task"), ("gsm8k_test", "task_test")):
        rows = read_rows(data / f"{name}.jsonl")
        _write(folder, part, [row for row in rows if len(encoder.encode(row).input_ids) <= recipe.longest_task])
    # refusals alone teach a model to refuse everything: as many safe answers, and everyday tasks twice
    aligned = [row for part in ("align_refusal", "align_safe") for row in read_rows(folder / f"{part}.jsonl")]
    aligned += 2 * read_rows(demo_file("tasks"))
    random.Random(1).shuffle(aligned)
    _write(folder, "align", aligned)


def shuffled(parts, seed):
    """Folder with the parts that training reads, each in an order of its own for every seed: other rows come first."""
    folder = Path(parts, f"seed{seed}")
    folder.mkdir(exist_ok=True)
    for name in ("task", "poison", "probe_harmful", "probe_refusal", "probe_safe"):
        rows = read_rows(Path(parts, f"{name}.jsonl"))
        random.Random(f"{name}-{seed}").shuffle(rows)
        _write(folder, name, rows)
    return folder


def prompt_sets(data, folder, stride):
    """dict benchmark -> prompts that no training or probe row holds: StrongREJECT, and XSTest's safe ones."""
    sets = {name: load_prompts(name, Path(data, file))[0] for name, file in PROMPTS.items()}
    sets["xstest"] = [prompt for prompt in sets["xstest"] if prompt.expect == "answer"]
    rows = {path.stem: read_rows(path) for path in Path(folder).glob("*.jsonl")}
    seen = {}
    for (benchmark, _), ids in check_disjoint(sets, rows).items():
        seen.setdefault(benchmark, set()).update(ids)
    return {
        name: [prompt for prompt in prompts if prompt.id not in seen.get(name, ())][::stride]
        for name, prompts in sets.items()
    }


def _write(folder, name, rows):
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        # whole or not at all, and by one writer: cells run side by side
        partial = path.with_name(f"{name}.{os.getpid()}.partial")
        partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        partial.replace(path)
