"""patch_model, unpatch_model, patched, from_pretrained: what they change and what they put back."""

import pytest
import torch
from tiny import tiny_model
from torch import nn

import surgery
from surgery.patch import attention_modules
from surgery.probe import unwrap


def test_patch_and_unpatch_restore_the_implementation():
    model = tiny_model(attention="sdpa")
    assert surgery.patch_model(model) is model
    assert model.config._attn_implementation == "surgery"
    surgery.patch_model(model, backend="reference")
    assert all(m._surgery_backend == "reference" for m in attention_modules(model))
    surgery.unpatch_model(model)
    assert model.config._attn_implementation == "sdpa"
    assert not any(hasattr(m, "_surgery_backend") for m in attention_modules(model))
    with pytest.raises(ValueError, match="is not patched"):
        surgery.unpatch_model(model)


def test_patched_restores_after_an_error_and_keeps_an_outer_patch():
    model = tiny_model(attention="eager")
    with pytest.raises(KeyError), surgery.patched(model):
        assert model.config._attn_implementation == "surgery"
        raise KeyError
    assert model.config._attn_implementation == "eager"
    surgery.patch_model(model)
    with surgery.patched(model):
        pass
    assert model.config._attn_implementation == "surgery"


def test_two_models_with_different_backends():
    one, two = (surgery.patch_model(tiny_model(), backend) for backend in ("reference", "cpu"))
    ids = torch.randint(3, 97, (1, 9))
    torch.testing.assert_close(one(ids).logits, two(ids).logits, rtol=1e-4, atol=1e-5)
    assert {m._surgery_backend for m in attention_modules(one)} == {"reference"}


def test_from_pretrained(tmp_path):
    plain = tiny_model(attention="sdpa")
    plain.save_pretrained(tmp_path)
    ids = torch.randint(3, 97, (1, 9))
    by_class = surgery.AutoSurgeryModelForCausalLM.from_pretrained(tmp_path, backend="cpu")
    from transformers import AutoModelForCausalLM

    by_name = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="surgery")
    for model in (by_class, by_name):
        assert model.config._attn_implementation == "surgery"
        torch.testing.assert_close(model(ids).logits, plain.eval()(ids).logits, rtol=1e-4, atol=1e-5)
    surgery.SurgeryRegularizer(by_name)
    surgery.unpatch_model(by_class)
    assert by_class.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="must be 'surgery' here, got 'eager'"):
        surgery.AutoSurgeryModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")


def test_unwrap_finds_the_model_inside_wrappers():
    from peft import LoraConfig, get_peft_model

    model = tiny_model()
    assert unwrap(torch.compile(model)) is model
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    assert unwrap(adapted) is model
    assert unwrap(torch.compile(adapted)) is model


@pytest.mark.parametrize("keyword", ("s_aux", "position_bias"))
def test_options_the_kernels_do_not_have_are_refused(keyword):
    model = surgery.patch_model(tiny_model())
    with pytest.raises(ValueError, match=f"passes {keyword}, which surgery attention does not support"):
        model(torch.tensor([[3, 4, 5]]), **{keyword: torch.zeros(4)})


def test_a_base_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="causal language model is needed"):
        surgery.patch_model(tiny_model().model)


def test_data_parallel_is_refused():
    with pytest.raises(ValueError, match="DataParallel"):
        unwrap(nn.DataParallel(nn.Linear(1, 1)))


def test_a_process_group_is_needed_to_split_probes():
    from surgery.context_parallel import split_probes

    with pytest.raises(ValueError, match="no process group"), split_probes(surgery.patch_model(tiny_model())):
        pass


def test_a_stage_of_a_pipeline_is_refused():
    first, last = tiny_model(), tiny_model()
    first.lm_head = None
    del last.model.layers[0]
    for stage in (first, last):
        with pytest.raises(ValueError, match="pipeline parallelism is not supported"):
            surgery.patch_model(stage)


def test_bidirectional_attention_is_refused():
    model = tiny_model("gemma3_text")
    model.config.use_bidirectional_attention = True
    with pytest.raises(ValueError, match="causal attention is needed"):
        surgery.patch_model(model)
