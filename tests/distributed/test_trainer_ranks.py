"""Trainer in every engine that runs on a CPU, against one process with the same global batches."""

import pytest
from ranks import run_ranks

pytestmark = pytest.mark.slow


def close(found, expected, tolerance):
    return len(found) == len(expected) and all(
        abs(a - b) <= tolerance * max(abs(b), 1e-3) for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("trained", ("full", "lora"))
def test_trainer_gives_the_same_losses_in_every_engine(tmp_path, trained):
    """Two micro-batches a step, clipping, AdamW, probes in chunks: losses, norms and penalties of five steps."""
    pytest.importorskip("deepspeed")
    runs = {}
    engines = {"one": 1, "ddp": 2, "zero2": 2, "zero3": 2} if trained == "full" else {"one": 1, "zero3": 2}
    for engine, ranks in engines.items():
        folder = tmp_path / engine
        folder.mkdir()
        runs[engine] = run_ranks("trainer_run.py", engine, trained, folder=folder, ranks=ranks)[0]
    one = runs.pop("one")
    classes = {"ddp": "DistributedDataParallel", "zero2": "DeepSpeedEngine", "zero3": "DeepSpeedEngine"}
    assert all(run["engine"] == classes[engine] for engine, run in runs.items())
    # the penalty moves the weights, or its loss would go unnoticed
    assert one["penalty"][0] > 0.1 and min(one["penalty"]) < 0.8 * one["penalty"][0]
    for engine, run in runs.items():
        for key, tolerance in (("loss", 1e-4), ("grad_norm", 1e-3), ("penalty", 1e-3)):
            assert close(run[key], one[key], tolerance), (engine, key, run[key], one[key])
