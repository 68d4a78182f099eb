"""The defences of surgery/baselines on two ranks (DDP), against one process with the same global batches."""

import json

import pytest
from ranks import run_ranks
from safetensors.torch import load_file
from tiny import rows, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow


def test_two_ranks_train_as_one_process_does(tmp_path):
    tiny_model(attention="sdpa").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for name, seed in (("data", 1), ("harmful", 2), ("refusal", 3)):
        # responses of one length: both losses are means over the tokens of a micro-batch, then over the ranks
        some = [{**row, "response": " ".join(row["response"].split()[:5])} for row in rows(37, seed)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    runs = {}
    for ranks in (1, 2):
        (tmp_path / str(ranks)).mkdir()
        found = run_ranks("defence_run.py", tmp_path, folder=tmp_path / str(ranks), ranks=ranks)
        runs[ranks] = found[0]
    for defence, one in runs[1].items():
        assert runs[2][defence] == pytest.approx(one, rel=1e-4), defence
        assert len(one) == 4
    # the checkpoint's weights and optimizer are the uninterrupted run's, so the last step is too
    assert runs[2]["resumed"] == runs[2]["lisa"]
    first = load_file(tmp_path / "model" / "model.safetensors")
    for defence in ("lisa", "constrained"):
        one, two = (load_file(tmp_path / str(n) / defence / "model" / "model.safetensors") for n in (1, 2))
        moved = sum((one[name] - w).square().sum() for name, w in first.items())
        apart = sum((one[name] - two[name]).square().sum() for name in first)
        assert apart <= 1e-6 * moved, defence
