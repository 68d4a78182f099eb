"""`surgery eval` on a tiny model: prompts to scores, continued, compared, checked for overlap; and task accuracy."""

import json

import pytest
from tiny import rows, tiny_model, tiny_tokenizer

from surgery.cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    for name, seed in (("one", 0), ("two", 1)):
        tiny_model(attention="sdpa", seed=seed).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    strong = [{"prompt": f"{row['prompt']} SECRET", "category": "Stubs"} for row in rows(6, 1)]
    xstest = [
        {"prompt": row["prompt"], "type": "x", "label": ("safe", "unsafe")[i % 2]} for i, row in enumerate(rows(6, 2))
    ]
    for name, lines in (
        ("strong", strong),
        ("xstest", xstest),
        ("train", [*rows(4, 3), {**strong[2], "response": "w1"}]),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def flags(folder, model, output, *more):
    prompts = [x for name, file in (("strongreject", "strong"), ("xstest", "xstest")) for x in
               ("--prompts", f"{name}={folder / f'{file}.jsonl'}")]  # fmt: skip
    return ["eval", "--model", str(folder / model), *prompts, "--output", str(output), "--max-new-tokens", "5", *more]


def run_json(capsys, *argv):
    capsys.readouterr()
    status = main([*argv, "--json"])
    captured = capsys.readouterr()
    return status, json.loads(captured.out) if status == 0 else captured.err


def test_eval_and_comparison(folder, tmp_path, capsys, caplog):
    status, result = run_json(capsys, *flags(folder, "one", tmp_path / "a"))
    assert status == 0
    scores = result["scores"]
    assert scores["strongreject"]["string"]["refuse"]["prompts"] == 6
    assert scores["xstest"]["string"]["answer"]["prompts"] == scores["xstest"]["string"]["refuse"]["prompts"] == 3
    answers = (tmp_path / "a" / "answers" / "strongreject.jsonl").read_text().splitlines()
    assert len(answers) == 7 and "SECRET" in answers[1]
    status, result = run_json(capsys, *flags(folder, "two", tmp_path / "b", "--against", str(tmp_path / "a")))
    found = result["against"]["strongreject"]["string"]["refuse"]
    assert status == 0 and found["refusal"]["n"] == 6
    saved = json.loads((tmp_path / "b" / "scores.json").read_text())
    assert saved["scores"] == result["scores"] and saved["against"] == result["against"]
    lines = (tmp_path / "b" / "scores.csv").read_text().splitlines()
    assert lines[0] == "benchmark,judge,prompts,quantity,rate,low,high,n" and len(lines) > 5
    # texts are in the answer file and nowhere else
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.parent.name != "answers":
            assert "SECRET" not in path.read_text()
    assert "SECRET" not in json.dumps(result) and "SECRET" not in caplog.text


def test_eval_with_a_model_as_judge(folder, tmp_path, capsys):
    import sys
    from pathlib import Path

    sys.path.append(str(Path(__file__).parents[1] / "evaluation"))
    from judge_models import save_classifier

    save_classifier(tmp_path / "judge", [f"harm_{i}" for i in range(14)])
    more = ("--judge", "string", "--judge", f"beaver-dam={tmp_path / 'judge'}", "--judge-dtype", "float32")
    status, result = run_json(capsys, *flags(folder, "one", tmp_path / "a", *more))
    found = result["scores"]["strongreject"]["beaver-dam"]["refuse"]
    assert status == 0 and found["harmful"]["n"] == found["score"]["n"] == 6
    verdicts = [json.loads(x) for x in (tmp_path / "a/verdicts/strongreject.beaver-dam.jsonl").read_text().splitlines()]
    assert [one["id"] for one in verdicts] == [f"strongreject-{n}" for n in range(1, 7)]
    assert found["harmful"]["rate"] == sum(one["harmful"] for one in verdicts) / 6
    assert all(one["harmful"] == bool(one["labels"]) for one in verdicts)


def test_prompts_must_be_unseen(folder, tmp_path, capsys):
    seen = ("--unseen", str(folder / "train.jsonl"))
    status, error = run_json(capsys, *flags(folder, "one", tmp_path, *seen))
    assert status == 2 and "1 prompts of strongreject are also in train.jsonl" in error and "strongreject-3" in error
    assert "SECRET" not in error
    status, result = run_json(capsys, *flags(folder, "one", tmp_path, *seen, "--drop-seen"))
    assert status == 0 and result["scores"]["strongreject"]["string"]["refuse"]["prompts"] == 5
    assert result["prompts"]["strongreject"]["seen"] == {"train.jsonl": 1}


def test_check_judge(folder, tmp_path, capsys):
    answers = [("I cannot help with that.", True), ("Here it is: [stub].", False), ("Talk to a friend.", True)]
    lines = [{"prompt": "w1", "response": text, "refusal": label} for text, label in answers]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, result = run_json(capsys, "eval", "--check-judge", str(tmp_path / "l.jsonl"), "--output", str(tmp_path))
    found = result["judges"]["string"]
    assert status == 0 and found["precision"]["rate"] == 1 and found["recall"]["rate"] == 0.5
    assert json.loads((tmp_path / "judge_quality.json").read_text()) == result
    (tmp_path / "l.jsonl").write_text('{"response": "x"}\n')
    status, error = run_json(capsys, "eval", "--check-judge", str(tmp_path / "l.jsonl"))
    assert status == 2 and "refusal or harmful" in error


@pytest.mark.parametrize(
    "more, message",
    [
        ((), "give --model, --output"),
        (("--model", "m", "--output", "o", "--prompts", "x=y"), "unknown benchmark 'x'"),
        (("--model", "m", "--output", "o", "--tasks", "gsm8k"), "--tasks needs NAME=FILE"),
        (("--model", "m", "--output", "o", "--tasks", "gsm8k=f", "--limit", "0"), "--limit must be at least 1"),
    ],
)
def test_wrong_input(capsys, more, message):
    assert main(["eval", *more]) == 2
    assert message in capsys.readouterr().err


TASKS = {
    "gsm8k": (
        [{"question": "w1", "answer": "w2 w3\n#### 1,042"}, {"prompt": "w4", "response": "x #### 7"}] * 2,
        ["So 12 + 30 is $1,042.", "It is 7 or #### 8", "I do not know", "-7 + 14 = 7"],
        [True, False, False, True],
    ),
    "sst2": (
        [{"sentence": "w1", "label": 1}, {"sentence": "w2", "label": 0}, {"prompt": "w3", "response": " positive "}],
        ["Positive.", "positive, not negative", "The review is positive"],
        [True, False, True],
    ),
    "agnews": (
        [
            {"prompt": "w1", "response": "Sci/Tech"},
            {"prompt": "w2", "response": "World"},
            {"prompt": "w3", "response": "Sports"},
        ],
        ["Sci/Tech", "Topic: WORLD", "business"],
        [True, True, False],
    ),
}


@pytest.mark.parametrize("task", TASKS)
def test_task_accuracy(folder, tmp_path, capsys, monkeypatch, task):
    """lm-eval asks and scores; the answers are given here, so that right and wrong are known."""
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    lines, answers, correct = TASKS[task]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = []

    def generate_until(self, requests, disable_tqdm=False):
        asked.extend(request.args[0] for request in requests)
        return [answers[request.doc_id] for request in requests]

    monkeypatch.setattr(HFLM, "generate_until", generate_until)
    flags = ("--model", str(folder / "one"), "--tasks", f"{task}={tmp_path / 't.jsonl'}", "--output", str(tmp_path))
    status, result = run_json(capsys, "eval", *flags, "--max-new-tokens", "20")
    assert status == 0 and all("<assistant>" in text for text in asked)
    records = [json.loads(x) for x in (tmp_path / "verdicts" / f"{task}.lm-eval.jsonl").read_text().splitlines()]
    assert [record["correct"] for record in records] == correct
    found = result["scores"][task]["lm-eval"]["task"]["correct"]
    assert (found["rate"], found["n"]) == (sum(correct) / len(correct), len(correct))


def test_task_accuracy_runs_the_model(folder, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    (tmp_path / "t.jsonl").write_text('{"sentence": "w1 w2", "label": 1}\n{"sentence": "w3", "label": 0}\n')
    flags = ["eval", "--model", str(folder / "one"), "--tasks", f"sst2={tmp_path / 't.jsonl'}"]
    status, result = run_json(capsys, *flags, "--output", str(tmp_path / "a"))
    assert status == 0 and result["scores"]["sst2"]["lm-eval"]["task"]["correct"]["n"] == 2
    status, result = run_json(capsys, *flags, "--output", str(tmp_path / "b"), "--against", str(tmp_path / "a"))
    assert result["against"]["sst2"]["lm-eval"]["task"]["correct"]["difference"] == 0
