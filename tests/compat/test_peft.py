"""PEFT's adapters in every form: the penalty's gradient equals eager autograd's on exactly the parameters it trains."""

import pytest
import torch
from tiny import eager_truth, gradients, probe_batches, tiny_model, worst_error
from torch import nn

import surgery
from surgery.patch import attention_modules

peft = pytest.importorskip("peft")
CHECKPOINTING = pytest.mark.parametrize("checkpointing", ("off", "non-reentrant", "reentrant"))


def lora(**options):
    return peft.LoraConfig(r=4, init_lora_weights=False, **{"target_modules": "all-linear", **options})


def one_adapter(**options):
    def make():
        model = tiny_model()
        torch.manual_seed(7)
        return peft.get_peft_model(model, lora(**options))

    return make


def second_of_two():
    """Two adapters; the second is active, the first must get nothing."""
    model = one_adapter()()
    torch.manual_seed(8)
    model.add_adapter("second", lora(target_modules=["q_proj", "v_proj"]))
    model.set_adapter("second")
    return model


def both_of_two():
    """Two adapters active at once (PEFT's mixed form on the base tuner)."""
    model = second_of_two()
    model.base_model.set_adapter(["default", "second"])
    return model


MODELS = {
    "lora": one_adapter(),
    "dora": one_adapter(use_dora=True),
    "rslora-some-layers": one_adapter(use_rslora=True, layers_to_transform=[1, 2], target_modules=["q_proj", "k_proj"]),
    "modules-to-save": one_adapter(target_modules=["q_proj", "o_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    "second-of-two": second_of_two,
    "both-of-two": both_of_two,
}


def checked(model, checkpointing, truth, value):
    if checkpointing != "off":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    if checkpointing == "reentrant":
        model.enable_input_require_grads()
    penalty = surgery.SurgeryRegularizer(surgery.patch_model(model), surgery.SurgeryConfig(sinks=1))(*probe_batches())
    penalty.backward()
    assert penalty.item() == pytest.approx(value, rel=1e-5) and value > 0
    assert worst_error(gradients(model), truth) <= 1e-5


@pytest.mark.parametrize("name", MODELS)
@CHECKPOINTING
def test_adapters(name, checkpointing):
    value, truth = eager_truth(MODELS[name](), *probe_batches())
    assert truth and any(g.norm() > 0 for g in truth.values())
    checked(MODELS[name](), checkpointing, truth, value)


def test_inactive_adapters_get_no_gradient():
    model = second_of_two()
    checked(model, "off", *eager_truth(second_of_two(), *probe_batches())[::-1])
    named = [(name, p.grad) for name, p in model.named_parameters() if ".default." in name]
    assert named and all(grad is None for _, grad in named)


def test_disabled_adapters_measure_the_base_model():
    """What DPO's reference pass without adapters sees."""
    model = surgery.patch_model(one_adapter()())
    ids = probe_batches()[0]
    with model.disable_adapter():
        disabled = surgery.sink_mass(model, **ids)
    torch.testing.assert_close(disabled, surgery.sink_mass(surgery.patch_model(tiny_model()), **ids))
    assert (surgery.sink_mass(model, **ids) - disabled).abs().max() > 1e-3


def test_merged_adapters_keep_the_patch():
    model = surgery.patch_model(one_adapter()())
    ids = probe_batches()[0]
    before = surgery.sink_mass(model, **ids)
    merged = model.merge_and_unload()
    torch.testing.assert_close(surgery.sink_mass(merged, **ids), before, rtol=1e-4, atol=1e-6)
    surgery.unpatch_model(merged)


class Linear4bit(nn.Linear):
    """A stand-in for QLoRA's layer: weights stored in 4 bits with a scale a row, made dense in each forward."""

    def __init__(self, dense):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = dense.in_features, dense.out_features, dense.bias
        scale = dense.weight.detach().abs().amax(1, keepdim=True) / 7
        codes = (dense.weight.detach() / scale).round().clamp(-7, 7).to(torch.int8) + 8
        self.register_buffer("codes", (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8))
        self.register_buffer("scale", scale)

    @property
    def weight(self):
        codes = torch.stack((self.codes >> 4, self.codes & 15), -1).flatten(1).to(self.scale.dtype) - 8
        return codes * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


def quantised(replace):
    """LoRA on a frozen model whose decoder's linear layers went through `replace`, prepared as QLoRA does."""
    model = tiny_model()
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, replace(child))
    for parameter in model.parameters():
        parameter.requires_grad = False
    # as transformers marks a model loaded so; PEFT then takes its own 4-bit layers
    model.is_loaded_in_4bit = hasattr(attention_modules(model)[0].q_proj.weight, "quant_state")
    torch.manual_seed(7)
    return peft.get_peft_model(model, lora(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))


@CHECKPOINTING
def test_four_bit_stand_in(checkpointing):
    value, truth = eager_truth(quantised(Linear4bit), *probe_batches())
    checked(quantised(Linear4bit), checkpointing, truth, value)


@CHECKPOINTING
def test_bitsandbytes(checkpointing):
    """The real Linear4bit in nf4, on the CPU as far as bitsandbytes runs there."""
    bnb = pytest.importorskip("bitsandbytes")

    def replace(dense):
        layer = bnb.nn.Linear4bit(
            dense.in_features, dense.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
        )
        layer.weight = bnb.nn.Params4bit(dense.weight.data, requires_grad=False, quant_type="nf4")
        return layer.to("cpu")

    def make():
        model = quantised(replace)
        adapted = attention_modules(model.get_base_model())[0].q_proj
        assert type(adapted).__name__ == "Linear4bit" and adapted.weight.dtype == torch.uint8
        return model

    value, truth = eager_truth(make(), *probe_batches())
    checked(make(), checkpointing, truth, value)
