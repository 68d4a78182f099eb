"""Benchmarks' own files to prompts, and whether they are unseen. All texts were written here."""

import csv
import json
import re

import pytest

from surgery.evaluation import BENCHMARKS, Prompt, load_prompts
from surgery.evaluation.disjoint import overlaps, prompt_texts
from surgery.evaluation.evaluate import check_disjoint


def write(path, rows):
    if path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_harmbench_puts_the_context_before_the_behaviour(tmp_path):
    columns = ("Behavior", "FunctionalCategory", "SemanticCategory", "Tags", "ContextString", "BehaviorID")
    rows = [
        ("Do a stub", "standard", "illegal", "", "", "slug_a"),
        ("Copy a stub poem", "copyright", "copyright", "", "", "slug_b"),
        ("Use the stub", "contextual", "chemical", "context", "Here is a stub, with\na line.", "slug_c"),
    ]
    path = write(tmp_path / "harmbench.csv", [dict(zip(columns, row, strict=True)) for row in rows])
    prompts, info = load_prompts("harmbench", path)
    assert [prompt.id for prompt in prompts] == ["harmbench-1", "harmbench-3"]
    assert prompts[0].text == prompts[0].behavior == "Do a stub" and prompts[0].context is None
    assert prompts[1].text == "Here is a stub, with\na line.\n\n---\n\nUse the stub"
    assert (prompts[1].context, prompts[1].behavior) == ("Here is a stub, with\na line.", "Use the stub")
    assert info["unused"] == 1 and "hashes" in info["unused_because"] and prompts[1].category == "chemical"


def test_sorrybench_takes_base_prompts(tmp_path):
    rows = [
        {"question_id": 1, "category": "3", "turns": ["Say a stub"], "prompt_style": "base"},
        {"question_id": 1, "category": "3", "turns": ["Sag a stob"], "prompt_style": "misspellings"},
        {"question_id": 2, "category": "4", "turns": ["Say two stubs"], "prompt_style": "base"},
    ]
    prompts, info = load_prompts("sorrybench", write(tmp_path / "question.jsonl", rows))
    assert [(prompt.id, prompt.text, prompt.category) for prompt in prompts] == [
        ("sorrybench-1", "Say a stub", "3"),
        ("sorrybench-3", "Say two stubs", "4"),
    ]
    assert info["unused"] == 1


@pytest.mark.parametrize(
    "benchmark, row, category",
    [
        ("strongreject", {"category": "Stubs", "source": "us", "forbidden_prompt": "Stub it"}, "Stubs"),
        ("strongreject", {"prompt": "Stub it", "category": "Stubs"}, "Stubs"),
        ("advbench", {"goal": "Stub it", "target": "Sure, here is"}, ""),
        ("beavertails", {"prompt": "Stub it", "response": "[stub]", "is_safe": "False"}, ""),
    ],
)
@pytest.mark.parametrize("ending", ("csv", "jsonl", "json"))
def test_columns_of_the_releases(tmp_path, benchmark, row, category, ending):
    (prompt,), info = load_prompts(benchmark, write(tmp_path / f"x.{ending}", [row]))
    assert (prompt.text, prompt.category, prompt.expect) == ("Stub it", category, "refuse")
    assert info == {"rows": 1, "prompts": 1, "repeated": 0, "unused": 0}


def test_xstest_knows_safe_from_unsafe(tmp_path):
    labelled = [{"prompt": "Kill a process", "type": "homonyms", "label": "safe"}]
    labelled += [{"prompt": "Kill a stub", "type": "contrast_homonyms", "label": "unsafe"}]
    first_release = [{"id": "v2-1", "prompt": row["prompt"], "type": row["type"]} for row in labelled]
    for i, rows in enumerate((labelled, first_release)):
        prompts, _ = load_prompts("xstest", write(tmp_path / f"{i}.csv", rows))
        assert [prompt.expect for prompt in prompts] == ["answer", "refuse"]


def test_repeats_and_limit(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"prompt": text} for text in ("a", "b", "a", "c", "d")])
    prompts, info = load_prompts("beavertails", path)
    assert [prompt.id for prompt in prompts] == [f"beavertails-{n}" for n in (1, 2, 4, 5)] and info["repeated"] == 1
    assert len(load_prompts("beavertails", path, repeats=True)[0]) == 5
    assert [prompt.text for prompt in load_prompts("beavertails", path, limit=3)[0]] == ["a", "b", "c"]


def test_hub_ids_are_split_into_name_configuration_and_split(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return [{"prompt": "Stub", "label": "safe", "Behavior": "Stub", "turns": ["Stub"], "goal": "Stub"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for benchmark in BENCHMARKS:
        load_prompts(benchmark)
    load_prompts("harmbench", "walledai/HarmBench@contextual:test")
    assert ("PKU-Alignment/BeaverTails", None, "30k_test") in asked
    assert asked[-1] == ("walledai/HarmBench", "contextual", "test") and len(asked) == 7


@pytest.mark.parametrize(
    "benchmark, text, message",
    [
        ("nothing", '{"prompt": "a"}\n', "unknown benchmark 'nothing'; known: beavertails"),
        ("advbench", '{"prompt": "a"}\n{"target": "b"}\n', r"x\.jsonl, row 2: needs a prompt in goal or prompt"),
        ("advbench", '{"prompt": "a"\n', r"x\.jsonl, line 1: not JSON"),
        ("advbench", '["a"]\n', "a row must be an object, got list"),
        ("advbench", "", "no prompt is left of 0 rows"),
        ("xstest", '{"prompt": "a"}\n', "need a label safe or unsafe"),
    ],
)
def test_bad_files_are_named(tmp_path, benchmark, text, message):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_prompts(benchmark, tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match=r"none\.csv: no such file"):
        load_prompts("advbench", tmp_path / "none.csv")


def test_hub_errors_say_both(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="neither a file nor a data set that can be loaded: no network"):
        load_prompts("advbench")


ROWS = ["How do I open a locked stub box without its key?", "Sing a song about the sea.", "What is two and two?"]


@pytest.mark.parametrize(
    "text, row",
    [
        ("how do i open a locked STUB box, without its key", 0),
        ("How do I open a locked stub box without a key?", 0),
        ("Sing a song about the sea, please.", 1),
        ("Sing a song about the mountains of the north.", None),
        ("How do I close a stub?", None),
        ("", None),
    ],
)
def test_overlaps(text, row):
    assert overlaps({"x": text}, ROWS) == ({} if row is None else {"x": row})


def test_overlaps_find_what_comparing_all_pairs_finds():
    import random

    generator = random.Random(0)
    words = [f"w{i}" for i in range(25)]
    texts = [" ".join(generator.sample(words, generator.randint(1, 12))) for _ in range(300)]
    mine, rows = {str(i): text for i, text in enumerate(texts[:100])}, texts[100:]
    for similarity in (0.5, 0.8, 1.0):
        expected = {}
        for name, text in mine.items():
            one = set(re.findall(r"\w+", text))
            alike = [len(one & set(row.split())) / len(one | set(row.split())) >= similarity for row in rows]
            if any(alike):
                expected[name] = alike.index(True)
        assert overlaps(mine, rows, similarity) == expected
    with pytest.raises(ValueError, match="similarity must be"):
        overlaps(mine, rows, 0)


def test_check_disjoint_looks_into_every_kind_of_row_and_into_other_sets():
    sets = {
        "a": [Prompt("a-1", "Open the stub box now", ""), Prompt("a-2", "Paint the house", "")],
        "b": [Prompt("b-1", "paint the house!", ""), Prompt("b-2", "Bake some bread", "")],
    }
    rows = [{"messages": [{"role": "user", "content": "open the stub box now"}, {"role": "assistant", "content": "x"}]}]
    rows += [{"text": "Bake some bread"}, {"prompt": "else", "response": "Paint the house"}]
    assert check_disjoint(sets, {"train": rows}) == {
        ("a", "train"): ["a-1"],
        ("b", "train"): ["b-2"],
        ("b", "a"): ["b-1"],
    }
    assert prompt_texts(rows[2]) == ["else"]
