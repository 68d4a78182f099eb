"""Probes of long sequences: peak memory grows with the length, for real and on fake tensors."""

import csv

import pytest
import torch
from tiny import tiny_model

import surgery
from bench import long_context
from bench.train_step_report import COLUMNS
from surgery.live_memory import LiveMemory


@pytest.mark.parametrize(
    ("family", "window"), (("llama", None), ("mistral", 64)), ids=("full-attention", "sliding-window")
)
@pytest.mark.parametrize("method", long_context.METHODS)
def test_memory_is_linear_in_length(method, family, window):
    overrides = {"num_hidden_layers": 1, "max_position_embeddings": 8192}
    if window:
        overrides["sliding_window"] = window
    model = surgery.patch_model(tiny_model(family, **overrides))
    peaks = []
    for length in (1024, 2048):
        model.zero_grad()
        with LiveMemory(model.parameters(), model.buffers()) as memory:
            long_context.run(model, method, length)
        peaks.append(memory.peak - memory.resident)
    # one head's score matrix alone would be 16 MiB at 2048
    assert peaks[1] <= 2.1 * peaks[0]


def test_the_measure_can_tell():
    """Eager attention, for comparison, is quadratic."""
    model = tiny_model(num_hidden_layers=1, max_position_embeddings=8192)
    peaks = []
    for length in (1024, 2048):
        with LiveMemory(model.parameters(), model.buffers()) as memory, torch.no_grad():
            model(torch.zeros(1, length, dtype=torch.int64), use_cache=False, logits_to_keep=1)
        peaks.append(memory.peak - memory.resident)
    assert peaks[1] > 3.5 * peaks[0]


def test_fake_128k_tokens(tmp_path, capsys):
    """Llama-3.2-1B's shape with two layers at 64k and 128k tokens, in seconds and without the memory."""
    path = tmp_path / "out.csv"
    arguments = ["--fake", "--model", "llama3.2-1b", "--layers", "2", "--lengths", "65536,131072", "--csv", str(path)]
    assert long_context.main(arguments) == 0
    assert "penalty 131072" in capsys.readouterr().out
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    growth = {row["mode"]: float(row["p50"]) for row in rows if row["metric"] == "growth"}
    assert set(growth) == {"sink_mass", "penalty"}
    assert all(1.8 <= x <= 2.02 for x in growth.values()), growth


def test_an_unknown_method_is_refused(capsys):
    with pytest.raises(SystemExit):
        long_context.main(["--methods", "sink_mass,maps"])
    assert "--methods must be out of sink_mass, find_sinks, penalty, got maps" in capsys.readouterr().err
