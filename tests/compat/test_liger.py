"""Liger's replacements together with ours: neither undoes the other.

Liger's Triton kernels need a GPU. What it does to a model, classes and forwards replaced, runs here as it is; RoPE and
the fused linear cross entropy run in Triton's interpreter; RMSNorm and SwiGLU, which the interpreter cannot run, get
the same arithmetic from torch.
"""

import pytest
import torch
from tiny import eager_truth, gradients, probe_batches, tiny_model, worst_error
from torch.nn import functional
from transformers.models.llama import modeling_llama

import surgery

REPLACED = ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")


class RMSNormArithmetic:
    @staticmethod
    def apply(x, weight, eps, offset, *rest):
        return functional.rms_norm(x, x.shape[-1:], weight + offset, eps)


@pytest.fixture
def liger(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("with a GPU liger-kernel is tested as it is, without the interpreter")
    # read when a kernel is defined, and again when it runs
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    liger = pytest.importorskip("liger_kernel.transformers")
    from liger_kernel.transformers import rms_norm, swiglu

    monkeypatch.setattr(rms_norm, "LigerRMSNormFunction", RMSNormArithmetic)
    monkeypatch.setattr(swiglu, "_swiglu_dispatch", lambda gate, up: functional.silu(gate) * up)
    # put back what Liger replaces in transformers' module
    for name in REPLACED:
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    monkeypatch.setattr(modeling_llama.LlamaForCausalLM, "forward", modeling_llama.LlamaForCausalLM.forward)
    return liger


def check(model, truth, value):
    penalty = surgery.SurgeryRegularizer(model, surgery.SurgeryConfig(sinks=1))(*probe_batches())
    penalty.backward()
    assert penalty.item() == pytest.approx(value, rel=1e-4)
    assert worst_error(gradients(model), truth) <= 1e-5


@pytest.mark.parametrize(
    ("order", "checkpointing"),
    (("liger-first", False), ("surgery-first", False), ("before-the-model", True)),
    ids=("liger-first", "surgery-first", "before-the-model-ckpt"),
)
def test_penalty_with_every_replacement(liger, order, checkpointing):
    value, truth = eager_truth(tiny_model(), *probe_batches())
    if order == "before-the-model":
        liger.apply_liger_kernel_to_llama()
        model = surgery.patch_model(tiny_model(), "cpu")
    else:
        model = tiny_model()
        if order == "surgery-first":
            surgery.patch_model(model, "cpu")
        liger.apply_liger_kernel_to_llama(model=model)
        surgery.patch_model(model, "cpu")
    assert modeling_llama.apply_rotary_pos_emb is liger.liger_rotary_pos_emb
    assert "Liger" in repr(model.model.layers[0])
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    check(model, truth, value)


def test_task_loss_without_logits(liger):
    """Liger's training forward returns no logits; the probe's must not take that way, and the task's may."""
    model, plain = tiny_model(), tiny_model(attention="sdpa")
    batch = {key: x[:1] for key, x in probe_batches()[0].items()}
    expected = plain(**batch, labels=batch["input_ids"], use_cache=False).loss
    value, truth = eager_truth(tiny_model(), *probe_batches())
    liger.apply_liger_kernel_to_llama(model=model)
    surgery.patch_model(model, "cpu")
    output = model(**batch, labels=batch["input_ids"], use_cache=False)
    assert output.logits is None
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    check(model, truth, value)
