"""Answer files that continue, rates, paired differences, and a judge against labels."""

import json

import numpy as np
import pytest
from scipy import stats
from tiny import tiny_model, tiny_tokenizer

from surgery.evaluation import Prompt, Verdict, answer_prompts, compare_scores, read_answers, score_verdicts
from surgery.evaluation.scores import judge_quality, records_of, share
from surgery.generate import generate_answers
from surgery.judges import is_incoherent


def prompts(count, expect="refuse"):
    return [Prompt(f"x-{i}", f"w{i} w{i + 1}", f"w{i}", expect=expect) for i in range(count)]


def records(harmful, incoherent=(), expect="refuse", score=None):
    answers = ["word word word word" if i in incoherent else "A fine answer." for i in range(len(harmful))]
    verdicts = [Verdict(harmful=x, score=score[i] if score else None) for i, x in enumerate(harmful)]
    return records_of(prompts(len(harmful), expect), answers, verdicts)


def test_answers_are_written_batch_by_batch_and_continued(tmp_path, monkeypatch):
    model, tokenizer, asked = tiny_model(attention="sdpa"), tiny_tokenizer(), prompts(7)
    options = dict(max_new_tokens=4, batch_size=2)
    whole = answer_prompts(model, tokenizer, asked, tmp_path / "whole.jsonl", {"model": "m"}, **options)
    assert whole == generate_answers(model, tokenizer, [p.text for p in asked], 4)
    from surgery.evaluation import answers as module

    calls = []

    def killed(*args, **kwargs):
        calls.append(args[2])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate_answers(*args, **kwargs)

    path = tmp_path / "sub" / "cut.jsonl"
    monkeypatch.setattr(module, "generate_answers", killed)
    with pytest.raises(KeyboardInterrupt):
        answer_prompts(model, tokenizer, asked, path, {"model": "m"}, **options)
    assert len(path.read_text().splitlines()) == 5
    # the kill also cut a line in the middle
    with open(path, "a") as file:
        file.write('{"id": "x-6", "resp')
    calls.clear()
    monkeypatch.setattr(module, "generate_answers", lambda *a, **k: calls.append(a[2]) or generate_answers(*a, **k))
    assert answer_prompts(model, tokenizer, asked, path, {"model": "m"}, **options) == whole
    assert sum(map(len, calls)) == 3
    assert answer_prompts(model, tokenizer, asked, path, {"model": "m"}, **options) == whole and len(calls) == 2


def test_answers_of_other_settings_or_prompts_are_refused(tmp_path):
    model, tokenizer, path = tiny_model(attention="sdpa"), tiny_tokenizer(), tmp_path / "a.jsonl"
    answer_prompts(model, tokenizer, prompts(2), path, {"model": "m"}, max_new_tokens=2)
    with pytest.raises(ValueError, match="was made with"):
        answer_prompts(model, tokenizer, prompts(2), path, {"model": "m"}, max_new_tokens=3)
    with pytest.raises(ValueError, match="x-0 is the answer to another prompt"):
        read_answers(path, [Prompt("x-0", "else", "")])
    (tmp_path / "b.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(ValueError, match="must hold the settings"):
        read_answers(tmp_path / "b.jsonl", [])
    (tmp_path / "c.jsonl").write_text("{\n{}\n")
    with pytest.raises(ValueError, match="line 1: not JSON"):
        read_answers(tmp_path / "c.jsonl", [])


def test_alpaca_prompt(monkeypatch):
    """Word for word as the git-disl family asks, with the tokenizer's own first token."""
    model, tokenizer, read = tiny_model(attention="sdpa"), tiny_tokenizer(None), []
    text = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nw1 w2\n\n### Response:\n"
    )
    model.register_forward_pre_hook(lambda m, a, k: read.append(k["input_ids"]), with_kwargs=True)
    generate_answers(model, tokenizer, ["w1 w2"], max_new_tokens=1, template="alpaca")
    assert read[0].tolist() == [tokenizer(text)["input_ids"]] and read[0][0, 0] == tokenizer.bos_token_id
    with pytest.raises(ValueError, match="template must be one of chat, alpaca, got 'x'"):
        generate_answers(model, tokenizer, ["w1"], template="x")
    with pytest.raises(ValueError, match="no system turn"):
        generate_answers(model, tokenizer, ["w1"], template="alpaca", system="w2")


@pytest.mark.parametrize(
    "text, broken",
    [
        ("no No, NO no", True),
        ("It was very very very good.", False),
        ("Buffalo buffalo buffalo 12 buffalo!", True),
        ("", True),
        ("A plain answer.", False),
    ],
)
def test_is_incoherent(text, broken):
    assert is_incoherent(text) is broken


def test_a_broken_model_does_not_look_safe():
    scores = score_verdicts(records([False] * 10, incoherent=range(10)))["refuse"]
    assert scores["harmful"]["rate"] == 0 and scores["incoherent"]["rate"] == 1
    assert scores["safe_and_coherent"]["rate"] == 0
    refusals = [Verdict(refusal=x) for x in (True, True, False)]
    by_string = records_of(prompts(3), ["I cannot.", "no no no no no", "Here."], refusals)
    assert [record["safe_and_coherent"] for record in by_string] == [True, False, False]


def test_rates_and_intervals():
    values = [True] * 12 + [False] * 27 + [None]
    found = records(values, score=[0.25] * 20 + [0.75] * 20)
    found[-1]["judged"] = False
    scores = score_verdicts(found)["refuse"]
    wilson = stats.binomtest(12, 39).proportion_ci(0.95, method="wilson")
    assert scores["harmful"] == {"rate": 12 / 39, "low": wilson.low, "high": wilson.high, "n": 39}
    assert scores["prompts"] == 40 and scores["unjudged"] == 1 and "refusal" not in scores
    assert scores["score"]["rate"] == 0.5 and 0.4 < scores["score"]["low"] < 0.45 < 0.55 < scores["score"]["high"]
    assert score_verdicts(found) == score_verdicts(found)
    assert share(0, 20)["high"] > 0.1


def test_over_refusal_is_apart_from_refusal():
    verdicts = [Verdict(refusal=True)] * 4
    both = records_of(prompts(2) + prompts(2, "answer"), ["I cannot."] * 4, verdicts)
    scores = score_verdicts(both)
    assert scores["refuse"]["refusal"]["n"] == scores["answer"]["refusal"]["n"] == 2
    assert "harmful" not in scores["answer"] and "safe_and_coherent" not in scores["answer"]


def test_paired_differences_are_tighter_than_apart_and_agree_with_scipy():
    generator = np.random.default_rng(0)
    before = generator.random(300) < 0.5
    after = before & (generator.random(300) < 0.8)
    found = compare_scores(records(before.tolist()), records(after.tolist()))["refuse"]["harmful"]
    gone = int((before & ~after).sum())
    assert (found["only_before"], found["only_after"]) == (gone, 0)
    assert found["p"] == pytest.approx(stats.binomtest(0, gone).pvalue)
    difference = after.astype(float) - before
    assert found["difference"] == pytest.approx(difference.mean())
    interval = stats.bootstrap((difference,), np.mean, method="percentile", rng=1).confidence_interval
    np.testing.assert_allclose((found["low"], found["high"]), interval, atol=0.01)
    apart = np.sqrt(before.var() / 300 + after.var() / 300) * 3.92
    assert found["high"] - found["low"] < 0.7 * apart


def test_comparison_pairs_by_id_and_text():
    before, after = records([True, False, True]), records([False, False, True])
    assert compare_scores(before[::-1], after[:2])["refuse"]["harmful"]["n"] == 2
    same = compare_scores(before, before)["refuse"]["harmful"]
    assert (same["difference"], same["p"]) == (0, 1.0)
    with pytest.raises(ValueError, match="differ under the same id: x-0"):
        compare_scores(before, [{**after[0], "digest": "other"}])
    with pytest.raises(ValueError, match="no prompt in common"):
        compare_scores(before, [{**after[0], "id": "y-0"}])
    with pytest.raises(ValueError, match="at least one record"):
        score_verdicts([])


def test_records_hold_no_text():
    secret = records_of([Prompt("x-1", "SECRET", "SECRET", "SECRET")], ["SECRET"], [Verdict(refusal=True)])
    assert "SECRET" not in json.dumps(secret)


def test_judge_quality():
    said, labels = [True, True, False, False, None], [True, False, True, False, True]
    found = judge_quality([{"refusal": x} for x in said], labels)
    assert [found[k] for k in ("true_positive", "false_positive", "false_negative", "true_negative")] == [1, 1, 1, 1]
    assert found["unjudged"] == 1 and found["precision"]["rate"] == found["recall"]["rate"] == 0.5
    with pytest.raises(ValueError, match="says nothing of harmful for any of 1"):
        judge_quality([{"harmful": None}], [True], "harmful")
