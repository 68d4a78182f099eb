"""The regulariser's value and gradients against output_attentions=True autograd, in every way a model is trained."""

import pytest
import torch
from tiny import eager_truth, gradients, probe_batches, tiny_model, worst_error

import surgery
from surgery.rows import as_probe_batch, sink_positions

EXACT = 1e-5
CHECKPOINTING = ("off", "non-reentrant", "reentrant")


def set_checkpointing(model, checkpointing):
    if checkpointing != "off":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    if checkpointing == "reentrant":
        model.enable_input_require_grads()


def with_lora(model, dropout=0.0):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(7)
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout, init_lora_weights=False)
    return get_peft_model(model, config)


def run(model, config, batches, scale=1.0):
    surgery.patch_model(model)
    regularizer = surgery.SurgeryRegularizer(model, config)
    penalty = regularizer(*batches)
    (penalty * scale).backward()
    return penalty.item(), gradients(model, scale), regularizer


@pytest.fixture
def config():
    return surgery.SurgeryConfig(sinks=1)


@pytest.mark.parametrize("scale", (1.0, 1024.0, 0.25))
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("lora", (False, True), ids=("full", "lora"))
def test_gradients_equal_eager(checkpointing, lora, scale, config):
    make = (lambda: with_lora(tiny_model())) if lora else tiny_model
    batches = probe_batches()
    value, truth = eager_truth(make(), *batches)
    model = make()
    set_checkpointing(model, checkpointing)
    penalty, found, _ = run(model, config, batches, scale)
    assert penalty == pytest.approx(value, rel=1e-5)
    assert value > 1
    assert worst_error(found, truth) <= EXACT


@pytest.mark.parametrize("checkpointing", ("off", "non-reentrant"))
@pytest.mark.parametrize("compiled", ("layer", "model"))
@pytest.mark.parametrize("lora", (False, True), ids=("full", "lora"))
def test_gradients_equal_eager_compiled(compiled, checkpointing, lora, config):
    torch._dynamo.reset()
    # two layers and no inductor for LoRA: the graph is the same kind, and compiling is what takes the time
    backend = "aot_eager" if lora else "inductor"
    overrides = {"num_hidden_layers": 2}
    make = (lambda: with_lora(tiny_model(**overrides))) if lora else lambda: tiny_model(**overrides)
    batches = probe_batches()
    value, truth = eager_truth(make(), *batches)
    model = make()
    set_checkpointing(model, checkpointing)
    if lora and checkpointing != "off" and hasattr(model.base_model.model, "_require_grads_hook"):
        # transformers adds a hook that calls requires_grad_() on the embeddings, which a whole-model graph cannot hold
        model.base_model.model.disable_input_require_grads()
    surgery.patch_model(model)
    wrapped = model
    if compiled == "layer":
        layers = model.base_model.model.model.layers if lora else model.model.layers
        for layer in layers:
            layer.compile(fullgraph=True, backend=backend)
    else:
        wrapped = torch.compile(model, fullgraph=True, backend=backend)
    regularizer = surgery.SurgeryRegularizer(wrapped, config)
    for scale in (1.0, 8.0):
        model.zero_grad()
        penalty = regularizer(*batches)
        (penalty * scale).backward()
        assert penalty.item() == pytest.approx(value, rel=1e-5)
        assert worst_error(gradients(model, scale), truth) <= EXACT


def test_accumulation_adds_to_the_task_gradient(config):
    """Split: the regulariser's backward first, then two micro-batches of the task."""
    batches = probe_batches()
    _, truth = eager_truth(tiny_model(), *batches)
    model = surgery.patch_model(tiny_model())
    ids = torch.randint(3, 97, (4, 12), generator=torch.Generator().manual_seed(3))

    def task():
        for micro in ids.chunk(2):
            (model(micro, labels=micro, use_cache=False).loss / 2).backward()

    task()
    task_only = gradients(model)
    model.zero_grad()
    surgery.SurgeryRegularizer(model, config)(*batches).backward()
    task()
    both = gradients(model)
    assert worst_error({n: both[n] - task_only[n] for n in both}, truth) <= EXACT


@pytest.mark.parametrize(
    "given, expected",
    [((0,), None), ((0, 1), None), ([[0, 1], [0, 1]], None), ((1,), [[1], [1]]), ((1, 0), [[1, 0]] * 2)],
    ids=str,
)
def test_positions_at_the_front_are_the_first_keys(given, expected):
    """What the argmax mostly finds: vendors' kernels can hide sinks at the front only."""
    positions, count = sink_positions(torch.tensor(given), torch.tensor([[0, 5], [2, 9]], dtype=torch.int32))
    assert (None if positions is None else positions.tolist()) == expected
    assert count == torch.tensor(given).shape[-1]


@pytest.mark.parametrize("left", (False, True), ids=("right-padded", "left-padded"))
@pytest.mark.parametrize(
    ("rows", "row_mask"), (("non_sink", False), ("response", True), ("all", True), ("all", False), ("non_sink", True))
)
@pytest.mark.parametrize("sinks", (1, 3, (2,), (0, 4)), ids=str)
def test_rows_and_sinks(rows, row_mask, sinks, left):
    batches = probe_batches(left=left, row_mask=row_mask)
    value, truth = eager_truth(tiny_model(seed=4), *batches, sinks=sinks, rows=rows)
    assert value > 0
    penalty, found, _ = run(tiny_model(seed=4), surgery.SurgeryConfig(sinks=sinks, rows=rows), batches)
    assert penalty == pytest.approx(value, rel=1e-5, abs=1e-4)
    assert worst_error(found, truth) <= EXACT


def sharp_model():
    """Attention so sharp that one sequence of probe_batches() has its sink elsewhere than the others."""
    model = tiny_model(seed=3)
    model.model.embed_tokens.weight.data *= 100
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 100
    return model


@pytest.mark.parametrize("left", (False, True), ids=("right-padded", "left-padded"))
def test_argmax_sink_is_the_largest_column_of_the_maps(left):
    model, found, expected = sharp_model(), [], []
    batches = probe_batches(left=left)
    for batch in batches:
        mask = batch["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        maps = model(**batch, position_ids=positions, output_attentions=True, use_cache=False).attentions
        total = sum((a * mask[:, None, :, None]).sum((1, 2)) for a in maps)
        expected += (total.argmax(-1) - mask.argmax(1)).tolist()
    surgery.patch_model(model)
    for batch in batches:
        found += surgery.find_sinks(model, batch).tolist()
    assert found == expected
    assert left or len(set(found)) > 1


def test_argmax_gradients_when_sequences_disagree(monkeypatch):
    """Every sequence has its own sink, and then every step searches."""
    batches, sinks = probe_batches(), torch.tensor([[0], [2], [1], [0], [3]], dtype=torch.int32)
    monkeypatch.setattr("surgery.regularizer.find_sinks", lambda model, batch: sinks[:, 0])
    value, truth = eager_truth(tiny_model(), *batches, sinks=sinks)
    penalty, gradient, regularizer = run(tiny_model(), surgery.SurgeryConfig(), batches)
    assert penalty == pytest.approx(value, rel=1e-5)
    assert worst_error(gradient, truth) <= EXACT
    assert regularizer.report.sink_position == -1
    assert regularizer.state_dict() == {"calls": 1, "sink_position": None, "dropped": 0}


def test_agreed_argmax_is_kept_until_the_refresh(monkeypatch):
    model, batches = surgery.patch_model(tiny_model()), probe_batches()
    regularizer = surgery.SurgeryRegularizer(model, surgery.SurgeryConfig(sink_refresh_steps=3))
    searched = []

    def find(model, batch):
        searched.append(regularizer._calls)
        return torch.full((batch.mask.shape[0],), 2, dtype=torch.int32)

    monkeypatch.setattr("surgery.regularizer.find_sinks", find)
    for _ in range(7):
        regularizer(*batches).backward()
        assert regularizer.report.sink_position == 2
    assert searched == [0, 3, 6]
    # position 2 does not exist in a sequence of two tokens: that step searches
    monkeypatch.setattr(
        "surgery.regularizer.find_sinks", lambda model, batch: torch.zeros(batch.mask.shape[0], dtype=torch.int32)
    )
    regularizer({"input_ids": torch.tensor([[5, 6]])}, batches[1]).backward()
    assert regularizer.report.sink_position == 0


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bf16", "fp16"))
def test_autocast_is_no_worse_than_eager(dtype, config):
    """Under autocast the error against float32 is at most twice that of eager attention maps under autocast."""
    batches = probe_batches()
    _, truth = eager_truth(tiny_model(), *batches)
    with torch.autocast("cpu", dtype):
        model = tiny_model()
        value = surgery.verify.eager_penalty(
            model, surgery.rows.join(*(as_probe_batch(b) for b in batches)), 2, 1, "non_sink", 300.0
        )
    value.backward()
    noise = worst_error(gradients(model), truth)
    with torch.autocast("cpu", dtype):
        model = surgery.patch_model(tiny_model())
        penalty = surgery.SurgeryRegularizer(model, config)(*batches)
    penalty.backward()
    assert worst_error(gradients(model), truth) <= 2 * noise


def test_lora_dropout_does_not_break_the_backward(config):
    """The recomputed pass of checkpointing draws the same dropout as the first one."""
    model = surgery.patch_model(with_lora(tiny_model(), dropout=0.3))
    found = []
    for checkpointing in ("off", "non-reentrant"):
        set_checkpointing(model, checkpointing)
        model.zero_grad()
        torch.manual_seed(5)
        surgery.SurgeryRegularizer(model, config)(*probe_batches()).backward()
        found.append(gradients(model))
    assert worst_error(found[1], found[0]) <= EXACT


def test_lambda_zero_gives_zero_and_negative_divergence_no_gradient(config):
    batches = probe_batches()
    penalty, found, _ = run(tiny_model(), surgery.SurgeryConfig(sinks=1, lambda_sink=0.0), batches)
    assert penalty == 0 and all(g.abs().max() == 0 for g in found.values())
    # the same text on both sides: d = 0 for every head, and relu's slope at 0 is 0
    same = probe_batches()[0]
    penalty, found, _ = run(tiny_model(), config, (same, same))
    assert penalty == 0 and all(g.abs().max() == 0 for g in found.values())


def test_report_and_statistics_agree(config):
    batches = probe_batches()
    _, _, regularizer = run(tiny_model(), config, batches)
    model = surgery.patch_model(tiny_model())
    masses = [surgery.sink_mass(model, **b) for b in batches]
    d = surgery.sink_divergence(*masses)
    torch.testing.assert_close(regularizer.report.divergence, d)
    torch.testing.assert_close(regularizer.report.harmful, masses[0].mean(1))
    assert regularizer.report.positive_heads == int((d > 0).sum())


def test_no_grad_returns_the_value_only(config):
    model = surgery.patch_model(tiny_model())
    regularizer = surgery.SurgeryRegularizer(model, config)
    with torch.no_grad():
        first = regularizer(*probe_batches())
    assert not first.requires_grad
    regularizer(*probe_batches()).backward()
