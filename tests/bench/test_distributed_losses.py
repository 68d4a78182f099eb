"""bench.distributed_losses on a tiny model: FSDP2 and ZeRO-3 give one process's losses, also after a kill."""

import csv
import json

import pytest
from tiny import rows, tiny_model, tiny_tokenizer

from bench.distributed_losses import compare, main


@pytest.mark.slow
def test_engines_agree_and_resume_after_a_kill(tmp_path, capsys, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tiny_model(attention="sdpa").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    files = []
    for name, seed, words in (("data", 1, 5), ("harmful", 2, 8), ("refusal", 3, 4)):
        text = "".join(json.dumps(row) + "\n" for row in rows(40, seed, response_words=words))
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
        files += [f"--{name}", str(tmp_path / f"{name}.jsonl")]
    options = ["--steps", "8", "--save-every", "3", "--max-length", "32", "--learning-rate", "1e-3", "--timeout", "120"]
    table = tmp_path / "losses.csv"
    assert main(["--model", str(tmp_path / "model"), *files, *options, "--kill", "only", "--csv", str(table)]) == 0
    assert capsys.readouterr().out.count("pass") == 3
    with open(table, newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    runs = {line["engine"] for line in lines}
    assert runs == {"one", "fsdp2-killed", "zero3-killed"} and len(lines) == 3 * 8
    penalties = [float(line["penalty"]) for line in lines if line["engine"] == "one"]
    assert penalties[0] > 0.1 and len(set(penalties)) == 8
    assert all(float(line["seconds_to_end"]) < 60 for line in lines if line["engine"].endswith("killed"))


def test_compare_sees_a_difference():
    reference = [{"step": 1, "task_loss": 2.0, "penalty": 1.0}, {"step": 2, "task_loss": 1.0, "penalty": 0.5}]
    other = [reference[0], {"step": 2, "task_loss": 1.001, "penalty": 0.52}]
    assert compare(reference, reference) == (0, 0)
    assert compare(other, reference) == pytest.approx((1e-3, 2e-2))
    with pytest.raises(RuntimeError, match="steps"):
        compare(reference[:1], reference)
