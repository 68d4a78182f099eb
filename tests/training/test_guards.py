"""Every way in which the regulariser could be lost in silence ends in an error."""

import pytest
import torch
from tiny import probe_batches, tiny_model
from torch import nn

import surgery
from surgery.attention import NAME, register
from surgery.probe import Probe


@pytest.fixture
def model():
    return surgery.patch_model(tiny_model())


@pytest.fixture
def regularizer(model):
    return surgery.SurgeryRegularizer(model, surgery.SurgeryConfig(sinks=1))


def test_unpatched_model():
    with pytest.raises(ValueError, match=r"'sdpa'.*not patched.*patch_model"):
        surgery.SurgeryRegularizer(tiny_model(attention="sdpa"))


def test_attention_replaced_after_patching(model, regularizer):
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="replaced after patch_model"):
        regularizer(*probe_batches())


def test_another_function_under_our_name(regularizer):
    from transformers import AttentionInterface

    try:
        AttentionInterface.register(NAME, lambda *args, **kwargs: None)
        with pytest.raises(ValueError, match="another attention function was registered"):
            regularizer(*probe_batches())
    finally:
        register()


def test_layer_that_wrote_no_statistic(model, regularizer, monkeypatch):
    """A wrapper that drops the keyword in one layer."""
    layer = model.model.layers[1].self_attn
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *args, surgery_ctx=None, **kwargs: forward(*args, **kwargs))
    with pytest.raises(RuntimeError, match=r"layers \[1\].*wrote no attention statistic"):
        regularizer(*probe_batches())


def test_nan_activations(model, regularizer):
    model.model.layers[2].self_attn.q_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match=r"layers \[2\]"):
        regularizer(*probe_batches())


def test_gradient_that_never_arrived(model, regularizer, monkeypatch):
    """Something detaches the hidden states between two layers: all layers below lose their gradient."""
    layer = model.model.layers[1]
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda hidden, *args, **kwargs: forward(hidden.detach(), *args, **kwargs))
    loss = regularizer(*probe_batches())
    with pytest.raises(RuntimeError, match=r"did not arrive in layers \[0\]"):
        loss.backward()


def embeddings_without_gradient(model):
    # transformers 5 switches their gradient on by itself
    if hasattr(model, "_require_grads_hook"):
        model.disable_input_require_grads()


def test_reentrant_checkpointing_of_frozen_embeddings():
    """LoRA without enable_input_require_grads: reentrant checkpointing would drop every gradient."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules="all-linear"))
    model.gradient_checkpointing_enable({"use_reentrant": True})
    embeddings_without_gradient(model.base_model.model)
    regularizer = surgery.SurgeryRegularizer(surgery.patch_model(model), surgery.SurgeryConfig(sinks=1))
    with pytest.raises(RuntimeError, match=r"no path to a trainable parameter.*enable_input_require_grads"):
        regularizer(*probe_batches())


def test_frozen_model(model, regularizer):
    model.requires_grad_(False)
    with pytest.raises(RuntimeError, match="no path to a trainable parameter"):
        regularizer(*probe_batches())


def train_only(model, prefix):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(prefix))


@pytest.mark.parametrize("trained", ("model.layers.1.mlp", "model.layers.1.self_attn.q_proj", "model.layers.2"))
def test_partly_frozen_models_expect_gradients_only_where_they_can_arrive(model, regularizer, trained):
    train_only(model, trained)
    regularizer(*probe_batches()).backward()
    assert any(p.grad.abs().max() > 0 for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("trained", ("lm_head", "model.layers.2.mlp"))
def test_nothing_trainable_before_an_attention_layer(model, regularizer, trained):
    train_only(model, trained)
    with pytest.raises(RuntimeError, match="the penalty cannot change anything"):
        regularizer(*probe_batches())


def test_loss_that_never_went_backward(regularizer):
    regularizer(*probe_batches())
    with pytest.raises(RuntimeError, match="never went backward"):
        regularizer(*probe_batches())


@pytest.mark.parametrize("wrap", (nn.DataParallel,), ids=("DataParallel",))
def test_data_parallel(model, wrap):
    with pytest.raises(ValueError, match=r"nn.DataParallel.*torchrun"):
        surgery.SurgeryRegularizer(wrap(model))
    with pytest.raises(ValueError, match=r"nn\.DataParallel"):
        surgery.patch_model(wrap(tiny_model()))


def test_fsdp1(model):
    class FullyShardedDataParallel(nn.Module):
        """Told by its name, since torch's own cannot be made without a process group."""

    wrapped = FullyShardedDataParallel()
    with pytest.raises(ValueError, match=r"FSDP1 .* is not supported: use FSDP2"):
        surgery.SurgeryRegularizer(wrapped)


def test_probe_without_a_valid_row(regularizer):
    harmful, refusal = probe_batches()
    short = {"input_ids": torch.tensor([[5, 6], [7, 0]]), "attention_mask": torch.tensor([[1, 1], [1, 0]])}
    with pytest.raises(ValueError, match=r"no query row counts in probe sequences \[1\]"):
        regularizer(short, refusal)
    with pytest.raises(ValueError, match=r"harmful batch: sequences \[1\] have no token"):
        regularizer({**short, "attention_mask": torch.tensor([[1, 1], [0, 0]])}, refusal)


def test_holes_in_the_padding_mask(regularizer):
    harmful, refusal = probe_batches()
    harmful["attention_mask"][0, 4] = 0
    with pytest.raises(ValueError, match=r"one contiguous run of ones.*rows \[0\]"):
        regularizer(harmful, refusal)


def test_sinks_outside_a_sequence(model):
    regularizer = surgery.SurgeryRegularizer(model, surgery.SurgeryConfig(sinks=(9,)))
    with pytest.raises(ValueError, match=r"sinks \[9\] lie outside sequence 3, which has 7 tokens"):
        regularizer(*probe_batches())


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"pixel_values": 1}, "may have"),
        ({"input_ids": torch.tensor([1, 2])}, r"\[B, T\]"),
        ({"row_mask": torch.ones(1, 3)}, r"'row_mask'\] must be"),
    ),
    ids=("unknown key", "one dimension", "shape of row_mask"),
)
def test_malformed_batches(regularizer, change, message):
    harmful, refusal = probe_batches()
    with pytest.raises(ValueError, match=message):
        regularizer({**harmful, **change}, refusal)


def test_response_rows_need_a_row_mask(model):
    regularizer = surgery.SurgeryRegularizer(model, surgery.SurgeryConfig(sinks=1, rows="response"))
    with pytest.raises(ValueError, match="needs a row_mask"):
        regularizer(*probe_batches())


def test_probe_with_a_cache_or_a_4d_mask(model):
    ids, mask = torch.randint(3, 97, (1, 6)), torch.ones(1, 1, 6, 6).tril().bool()
    bounds = torch.tensor([[0, 6]], dtype=torch.int32)
    probe = Probe("mass", torch.full((3, 1, 4), float("nan")), bounds, torch.full((1, 6), 1 / 6), None, 1)
    with pytest.raises(ValueError, match="no cache"):
        model(ids, attention_mask=mask, surgery_ctx=probe, use_cache=False)


def test_attention_dropout():
    with pytest.raises(ValueError, match=r"attention_dropout must be 0, got 0\.1"):
        surgery.patch_model(tiny_model(attention_dropout=0.1))


def test_unknown_family_and_backend():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=8)
    with pytest.raises(ValueError, match=r"unknown model family 'gpt2'; known: .*llama"):
        surgery.patch_model(GPT2LMHeadModel(config))
    with pytest.raises(ValueError, match="unknown backend 'fast'; known: 'auto', 'cpu'"):
        surgery.patch_model(tiny_model(), backend="fast")


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"lambda_sink": -1.0}, "lambda_sink must be >= 0, got -1.0"),
        ({"lambda_sink": float("nan")}, "finite"),
        ({"sinks": "first"}, "'argmax'"),
        ({"sinks": 0}, "int >= 1"),
        ({"rows": "most"}, "non_sink, response, all"),
        ({"pairs_per_step": 0}, "int >= 1, got 0"),
        ({"backend": "fast"}, "backend must be one of auto"),
        ({"max_length": 1}, "int >= 2"),
    ),
    ids=str,
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        surgery.SurgeryConfig(**options)


def test_config_presets_and_round_trip(tmp_path):
    with pytest.raises(ValueError, match="unknown preset 'lisa'; known: paper, upstream"):
        surgery.SurgeryConfig.from_preset("lisa")
    with pytest.raises(ValueError, match="unknown SurgeryConfig options"):
        surgery.SurgeryConfig.from_dict({"lambda": 3})
    upstream = surgery.SurgeryConfig.upstream()
    assert (upstream.sinks, upstream.pairs_per_step, upstream.double_bos) == (1, 1, True)
    assert "merely *safe* answers" in surgery.SurgeryConfig.upstream.__doc__
    with pytest.raises(ValueError, match=r"label and sets nothing: use SurgeryConfig.upstream\(\)"):
        surgery.SurgeryConfig(preset="upstream")
    with pytest.raises(ValueError, match="unknown SurgeryConfig options"):
        surgery.SurgeryConfig.from_preset("upstream", lamda=3)
    config = surgery.SurgeryConfig(sinks="0,3", rows="all")
    assert config.sinks == (0, 3)
    config.save(tmp_path)
    assert surgery.SurgeryConfig.load(tmp_path) == config
    assert [surgery.SurgeryConfig(sinks=s).sinks for s in ("argmax", "2", "4,", [1, 2])] == ["argmax", 2, (4,), (1, 2)]
