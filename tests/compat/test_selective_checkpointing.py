"""Selective activation checkpointing with our operators in the save list: exact, and attention computed once."""

import functools

import pytest
import surgery_kernels.ops
import torch
from test_peft import one_adapter
from tiny import eager_truth, gradients, probe_batches, tiny_model, worst_error
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import surgery
from surgery import penalty_op

SAVED = [torch.ops.surgery.attn_stats.default, torch.ops.surgery.penalty_attn.default]
CONTEXTS = functools.partial(create_selective_checkpoint_contexts, SAVED)


def checkpointed(model, how):
    """`model` with every layer checkpointed, as README says, or as accelerate and torchtitan do it."""
    if how == "all":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    elif how == "save-list":
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": CONTEXTS})
    else:
        wrap = functools.partial(checkpoint_wrapper, context_fn=CONTEXTS)
        apply_activation_checkpointing(
            model, checkpoint_wrapper_fn=wrap, check_fn=lambda module: type(module).__name__ == "LlamaDecoderLayer"
        )
    return model


@pytest.fixture
def calls(monkeypatch):
    """How often the attention forward of each operator was computed."""
    counts = {"penalty": 0, "plain": 0}
    for module, name in ((penalty_op, "penalty"), (surgery_kernels.ops, "plain")):

        def counted(*args, real=module.attn_forward, name=name):
            counts[name] += 1
            return real(*args)

        monkeypatch.setattr(module, "attn_forward", counted)
    return counts


@pytest.mark.parametrize(("how", "computed"), (("all", 6), ("save-list", 3), ("wrapped-save-list", 3)))
@pytest.mark.parametrize("make", (tiny_model, one_adapter()), ids=("full", "lora"))
def test_penalty(make, how, computed, calls):
    value, truth = eager_truth(make(), *probe_batches())
    model = checkpointed(make(), how)
    if make is not tiny_model:
        model.enable_input_require_grads()
    surgery.patch_model(model)
    penalty = surgery.SurgeryRegularizer(model, surgery.SurgeryConfig(sinks=1))(*probe_batches())
    penalty.backward()
    assert penalty.item() == pytest.approx(value, rel=1e-5)
    found = {name.replace("_checkpoint_wrapped_module.", ""): g for name, g in gradients(model).items()}
    assert worst_error(found, truth) <= 1e-5
    assert calls == {"penalty": computed, "plain": 0}


@pytest.mark.parametrize(("how", "computed"), (("all", 6), ("save-list", 3)))
def test_task(how, computed, calls):
    batch = probe_batches()[0]
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    plain, model = tiny_model(attention="sdpa"), surgery.patch_model(checkpointed(tiny_model(), how))
    for one in (plain, model):
        one(**batch, labels=labels, use_cache=False).loss.backward()
    assert worst_error(gradients(model), gradients(plain)) <= 1e-5
    assert calls == {"penalty": 0, "plain": computed}
