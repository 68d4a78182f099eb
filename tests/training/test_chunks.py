"""Two passes: probes in chunks, and probes that are left out because the activations are not finite."""

import pytest
import torch
from tiny import eager_truth, gradients, probe_batches, tiny_model, worst_error

import surgery
from surgery.statistics import NonFiniteStatistic

EXACT = 1e-5


def chunked(model, config, batches, backward=None):
    """Gradients and regulariser after one `backward`."""
    regularizer = surgery.SurgeryRegularizer(surgery.patch_model(model), config)
    value = regularizer.backward(*batches, backward)
    return value.item(), gradients(model), regularizer


@pytest.mark.parametrize("checkpointing", (None, False, True), ids=("off", "non-reentrant", "reentrant"))
@pytest.mark.parametrize("size", (None, 1, 2, 3, 5, 8))
def test_chunks_equal_eager(size, checkpointing):
    """5 sequences; a chunk of 3 holds both sides, one of 1 or 2 only one of them."""
    batches = probe_batches()
    value, truth = eager_truth(tiny_model(), *batches)
    model = tiny_model()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    if checkpointing:
        model.enable_input_require_grads()
    penalty, found, _ = chunked(model, surgery.SurgeryConfig(sinks=1, probe_chunk_size=size), batches)
    assert penalty == pytest.approx(value, rel=1e-5)
    assert value > 1
    assert worst_error(found, truth) <= EXACT


def test_argmax_sinks_in_chunks(monkeypatch):
    sinks = torch.tensor([[0], [2], [1], [0], [3]], dtype=torch.int32)
    batches = probe_batches()
    lengths = []

    def find(model, batch):
        start = sum(lengths)
        lengths.append(len(batch.mask))
        return sinks[start : start + lengths[-1], 0]

    monkeypatch.setattr("surgery.regularizer.find_sinks", find)
    value, truth = eager_truth(tiny_model(), *batches, sinks=sinks)
    penalty, found, regularizer = chunked(tiny_model(), surgery.SurgeryConfig(probe_chunk_size=2), batches)
    assert lengths == [2, 2, 1]
    assert penalty == pytest.approx(value, rel=1e-5)
    assert worst_error(found, truth) <= EXACT
    assert regularizer.report.sink_position == -1


def test_both_passes_draw_the_same_dropout():
    """One chunk in two passes equals one pass, adapter dropout included: same signs, same masks."""
    from peft import LoraConfig, get_peft_model

    found = []
    for size in (None, 5):
        torch.manual_seed(7)
        lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3, init_lora_weights=False)
        model = get_peft_model(tiny_model(), lora)
        divergence = "per_rank" if size is None else "global"
        torch.manual_seed(11)
        config = surgery.SurgeryConfig(sinks=1, divergence=divergence)
        penalty, gradient, _ = chunked(model, config, probe_batches())
        found.append((penalty, gradient, torch.get_rng_state()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert worst_error(found[1][1], found[0][1]) <= EXACT
    assert torch.equal(found[0][2], found[1][2])


def test_a_call_refuses_several_chunks():
    model = surgery.patch_model(tiny_model())
    regularizer = surgery.SurgeryRegularizer(model, surgery.SurgeryConfig(sinks=1, probe_chunk_size=2))
    with pytest.raises(ValueError, match=r"5 probe sequences in chunks of 2.*regularizer\.backward"):
        regularizer(*probe_batches())
    with torch.no_grad():
        value = regularizer(*probe_batches())
        with pytest.raises(RuntimeError, match=r"under torch\.no_grad"):
            regularizer.backward(*probe_batches())
    assert value == pytest.approx(eager_truth(tiny_model(), *probe_batches())[0], rel=1e-5)


def test_the_callers_backward_is_used():
    batches, seen = probe_batches(), []

    def scaled(loss):
        seen.append(loss.item())
        (loss * 1024).backward()

    _, truth = eager_truth(tiny_model(), *batches)
    penalty, found, _ = chunked(tiny_model(), surgery.SurgeryConfig(sinks=1, probe_chunk_size=2), batches, scaled)
    assert len(seen) == 3 and sum(seen) == pytest.approx(penalty, rel=1e-6)
    assert worst_error({name: g / 1024 for name, g in found.items()}, truth) <= EXACT


def test_a_gradient_lost_in_one_chunk(monkeypatch):
    model = tiny_model()
    layer, calls = model.model.layers[1], []
    forward = layer.forward

    def cut(hidden, *args, **kwargs):
        if torch.is_grad_enabled():
            calls.append(len(hidden))
        return forward(hidden.detach() if len(calls) == 2 else hidden, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", cut)
    with pytest.raises(RuntimeError, match=r"did not arrive in layers \[0\]"):
        chunked(model, surgery.SurgeryConfig(sinks=1, probe_chunk_size=2), probe_batches())
    assert calls == [2, 2]


def poisoned(sinks="argmax", **options):
    model = surgery.patch_model(tiny_model())
    regularizer = surgery.SurgeryRegularizer(model, surgery.SurgeryConfig(sinks=sinks, **options))
    regularizer.backward(*probe_batches())
    model.zero_grad()
    weight = model.model.layers[1].self_attn.v_proj.weight
    kept = weight.detach().clone()
    weight.data[0, 0] = float("nan")
    return model, regularizer, lambda: weight.data.copy_(kept)


@pytest.mark.parametrize("sinks", (1, "argmax"))
@pytest.mark.parametrize("chunk", (None, 2))
def test_nonfinite_probe_raises(sinks, chunk):
    model, regularizer, _ = poisoned(sinks, probe_chunk_size=chunk, sink_refresh_steps=1)
    with pytest.raises(NonFiniteStatistic, match=r"layers \[2\]: the model's activations on the probe are NaN"):
        regularizer.backward(*probe_batches())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("sinks", (1, "argmax"))
@pytest.mark.parametrize("chunk", (None, 2))
@pytest.mark.parametrize("call", (False, True), ids=("backward", "call"))
def test_nonfinite_probe_is_dropped_and_counted(sinks, chunk, call):
    """No gradient, not even NaN; afterwards everything goes on, with the sink known before."""
    if call and chunk:
        pytest.skip("a call takes one chunk")
    model, regularizer, repair = poisoned(sinks, probe_chunk_size=chunk, nonfinite="drop", sink_refresh_steps=1)
    known = regularizer.state_dict()["sink_position"]
    if call:
        regularizer(*probe_batches()).backward()
    else:
        regularizer.backward(*probe_batches())
    assert all(p.grad is None for p in model.parameters())
    assert regularizer.report.dropped and regularizer.dropped == 1
    assert regularizer.report.penalty == 0 and regularizer.report.divergence.isnan().all()
    assert regularizer.state_dict() == {"calls": 2, "sink_position": known, "dropped": 1}
    repair()
    _, truth = eager_truth(tiny_model(), *probe_batches())
    regularizer.backward(*probe_batches())
    assert not regularizer.report.dropped and regularizer.dropped == 1
    if sinks == 1:
        assert worst_error(gradients(model), truth) <= EXACT


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"probe_chunk_size": 0}, "probe_chunk_size must be an int >= 1 or None, got 0"),
        ({"probe_chunk_size": True}, "probe_chunk_size must be"),
        ({"divergence": "local"}, "divergence must be one of per_rank, global, got 'local'"),
        ({"nonfinite": "ignore"}, "nonfinite must be one of raise, drop"),
    ),
    ids=str,
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        surgery.SurgeryConfig(**options)
