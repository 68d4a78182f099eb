"""axolotl's plugin and LLaMA-Factory's recipe: on the frameworks where installed, else on doubles of what they call.

The doubles hold only what the plugin touches: axolotl's BasePlugin and its configuration, LLaMA-Factory's run_exp and
the workflow module whose class it builds.
"""

import importlib
import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml
from tiny import tiny_model, tiny_tokenizer
from transformers import Trainer
from trl_cases import HARMFUL, OPTIONS, REFUSAL

import surgery
from surgery.integrations import read_options
from surgery.run_files import read_history

PROBES = {"harmful": HARMFUL, "refusal": REFUSAL, "pairs_per_step": 2}


def plain_trainer(folder, **more):
    from transformers import TrainingArguments

    ids = torch.randint(3, 97, (8, 12), generator=torch.Generator().manual_seed(3))
    data = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]
    args = TrainingArguments(str(folder), **{name: x for name, x in OPTIONS.items() if name != "learning_rate"})
    return {
        "model": tiny_model(attention="sdpa"),
        "args": args,
        "train_dataset": data,
        "processing_class": tiny_tokenizer(),
        **more,
    }


def test_options():
    config, harmful, refusal = read_options({**PROBES, "sinks": [0, 2], "lambda_sink": 10.0})
    assert (config.sinks, config.lambda_sink, config.pairs_per_step) == ((0, 2), 10.0, 2)
    assert (harmful, refusal) == (HARMFUL, REFUSAL)
    assert read_options({**PROBES, "preset": "upstream"})[0].double_bos
    for wrong, message in (
        (None, "must be a mapping"),
        ({"harmful": "x"}, "refusal missing"),
        ({**PROBES, "lambda": 3}, r"unknown SurgeryConfig options \['lambda'\]"),
        ({**PROBES, "lambda_sink": -1.0}, "must be >= 0"),
        ({**PROBES, "preset": "mine"}, r"unknown preset 'mine'; known: paper, upstream"),
    ):
        with pytest.raises(ValueError, match=message):
            read_options(wrong)


@pytest.fixture
def axolotl(monkeypatch):
    """surgery.integrations.axolotl on the real package or on a double of its base class."""
    pytest.importorskip("pydantic")
    if importlib.util.find_spec("axolotl") is None:
        packages = {name: ModuleType(name) for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base")}
        packages["axolotl.integrations.base"].BasePlugin = type("BasePlugin", (), {})
        for name, module in packages.items():
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "surgery.integrations.axolotl", raising=False)
    yield importlib.import_module("surgery.integrations.axolotl")
    sys.modules.pop("surgery.integrations.axolotl", None)


def test_axolotl_arguments(axolotl):
    module, name = axolotl.SurgeryPlugin().get_input_args().rsplit(".", 1)
    arguments = getattr(importlib.import_module(module), name)
    assert arguments(surgery=PROBES).surgery == PROBES
    assert arguments().surgery is None
    with pytest.raises(ValueError, match="unknown SurgeryConfig options"):
        arguments(surgery={**PROBES, "lamda_sink": 1})


def test_axolotl_trains_with_the_callback(axolotl, tmp_path):
    trainer = Trainer(**plain_trainer(tmp_path))
    for callback in axolotl.SurgeryPlugin().add_callbacks_post_trainer({"surgery": PROBES}, trainer):
        trainer.add_callback(callback)
    trainer.train()
    assert [line["step"] for line in read_history(tmp_path)] == [1]
    assert read_history(tmp_path)[0]["penalty"] > 0


@pytest.mark.parametrize(
    ("cfg", "args", "message"),
    (
        ({}, {}, "no `surgery:`"),
        ({"surgery": PROBES}, {"sample_packing": True}, "numbers the documents"),
        (
            {"surgery": PROBES, "pretraining_dataset": "x"},
            {"sample_packing": True, "sample_packing_drop_attention_mask": True},
            "map-style dataset",
        ),
        ({"surgery": PROBES, "context_parallel_size": 2}, {}, "context_parallel_size must be 1, got 2"),
    ),
    ids=("missing", "packing", "streaming", "context-parallel"),
)
def test_axolotl_refuses(axolotl, cfg, args, message):
    with pytest.raises(ValueError, match=message):
        axolotl.SurgeryPlugin().add_callbacks_post_trainer(cfg, SimpleNamespace(args=SimpleNamespace(**args)))


@pytest.fixture
def factory(monkeypatch, tmp_path):
    """A double of LLaMA-Factory: run_exp calls the workflow of the stage, which builds its module's trainer class."""
    workflow, tuner = ModuleType("llamafactory.train.sft.workflow"), ModuleType("llamafactory.train.tuner")

    class CustomSeq2SeqTrainer(Trainer):
        def __init__(self, finetuning_args, processor, **kwargs):
            super().__init__(**kwargs)

    workflow.CustomSeq2SeqTrainer = CustomSeq2SeqTrainer

    def run_exp(args):
        tuner.seen = args
        if args.get("fail"):
            raise KeyError("fail")
        tuner.trainer = workflow.CustomSeq2SeqTrainer(finetuning_args=None, processor=None, **plain_trainer(tmp_path))
        tuner.trainer.train()

    tuner.run_exp = run_exp
    for name in ("llamafactory", "llamafactory.train", "llamafactory.train.sft"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for module in (workflow, tuner):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return SimpleNamespace(workflow=workflow, tuner=tuner, trainer_class=CustomSeq2SeqTrainer)


def test_llamafactory(factory, tmp_path):
    from surgery.integrations import llamafactory

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"stage": "sft", "model_name_or_path": "x"}), encoding="utf-8")
    llamafactory.run(recipe, PROBES)
    assert factory.tuner.seen == {"stage": "sft", "model_name_or_path": "x"}
    assert isinstance(factory.tuner.trainer, factory.trainer_class)
    assert read_history(tmp_path)[0]["penalty"] > 0
    assert factory.workflow.CustomSeq2SeqTrainer is factory.trainer_class
    with pytest.raises(KeyError):
        llamafactory.run({"fail": True}, PROBES)
    assert factory.workflow.CustomSeq2SeqTrainer is factory.trainer_class


@pytest.mark.parametrize(
    ("args", "message"),
    (
        ({"stage": "ppo"}, "stage must be one of pt, sft, dpo, got 'ppo'"),
        ({"use_unsloth": True}, "use_unsloth must be off"),
        ({"neat_packing": True}, "neat_packing needs flash_attn: sdpa .* got 'auto'"),
        ({"neat_packing": True, "flash_attn": "fa2"}, "got 'fa2'"),
    ),
)
def test_llamafactory_refuses(factory, args, message):
    from surgery.integrations import llamafactory

    with pytest.raises(ValueError, match=message):
        llamafactory.run(args, PROBES)


def test_float_masks_of_packed_documents():
    """LLaMA-Factory's neat_packing with sdpa: a 4-D additive mask, with and without softcap."""
    for family in ("llama", "gemma2"):
        model, plain = surgery.patch_model(tiny_model(family)).eval(), tiny_model(family).eval()
        ids = torch.randint(3, 97, (1, 6))
        seen = torch.ones(6, 6, dtype=torch.bool).tril()
        seen[3:, :3] = False
        mask = torch.zeros(1, 1, 6, 6).masked_fill(~seen, torch.finfo(torch.float32).min)
        with torch.no_grad():
            ours, theirs = (one(ids, attention_mask=mask, use_cache=False).logits for one in (model, plain))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
