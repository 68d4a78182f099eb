"""Trainer in every engine that runs on a CPU, against one process with the same global batches."""

import pytest
import torch
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


def test_train_refuses_what_would_not_do_what_it_says(tmp_path):
    from surgery.finetune import TrainConfig

    files = {"data": "d", "harmful": "h", "refusal": "r", "output": str(tmp_path / "run")}
    zero3 = tmp_path / "zero3.json"
    zero3.write_text('{"zero_optimization": {"stage": 3}}', encoding="utf-8")
    with pytest.raises(ValueError, match="ZeRO-3 saves no weights unless"):
        TrainConfig(**files, deepspeed=str(zero3))
    with pytest.raises(ValueError, match="no such file"):
        TrainConfig(**files, deepspeed=str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match="exclude each other"):
        TrainConfig(**files, deepspeed=str(zero3), fsdp=True)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="accelerate would train with DDP instead"):
            TrainConfig(**files, fsdp=True)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="accelerate runs FSDP2 on GPUs only, and this needs two")
@pytest.mark.parametrize("trained", ("full", "lora"))
def test_trainer_with_fsdp2_on_gpus(tmp_path, trained):
    """Trainer + accelerate + FSDP2 on two GPUs against one process on the CPU, float32."""
    runs = {}
    for engine, ranks in (("one", 1), ("fsdp2", 2)):
        folder = tmp_path / engine
        folder.mkdir()
        runs[engine] = run_ranks("trainer_run.py", engine, trained, folder=folder, ranks=ranks)[0]
    assert runs["fsdp2"]["engine"].startswith("FSDP")
    for key in ("loss", "grad_norm", "penalty"):
        # another device's arithmetic, five steps of AdamW apart
        assert close(runs["fsdp2"][key], runs["one"][key], 5e-3), key
