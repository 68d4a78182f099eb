"""LiveMemory, the memory estimate, and the paper's way as a baseline."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import surgery
from surgery.estimate import estimate_step, shape_config
from surgery.families import TINY
from surgery.live_memory import LiveMemory
from surgery.paper_way import eager_attention, paper_penalty

WIDE = {**TINY, "model_type": "llama", "max_position_embeddings": 4096}


def tiny_llama():
    """Peaky attention, so that divergences are of both signs."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**TINY, "model_type": "llama"})).train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                p.mul_(12)
    return surgery.patch_model(model)


def probe_batch(lengths, seed):
    """Right-padded batch with sequences of `lengths`."""
    ids = torch.randint(3, 97, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()])


def test_live_memory_counts_storages_until_they_die():
    alive = torch.zeros(1000)
    with LiveMemory([alive, None]) as memory:
        assert (memory.resident, memory.live) == (4000, 4000)
        made = alive + 1
        view = made.view(10, 100)[3]
        assert memory.live == 8000
        made.add_(1)
        assert memory.live == 8000
        del made
        assert memory.live == 8000, "the view holds the storage"
        del view
        assert memory.live == 4000
        assert memory.peak == 8000


def test_live_memory_sees_what_autograd_saves():
    x = torch.randn(1000, requires_grad=True)
    with LiveMemory(x) as memory:
        y = x.exp()
        loss = y.sum()
        del y
        assert memory.live == 8004, "exp keeps its result for the backward"
        loss.backward()
        # x, the loss and x.grad; the result of exp is gone
        assert memory.live == 8004


def test_live_memory_looks_into_our_operators():
    q = torch.randn(1, 64, 2, 16)
    peaks = {}
    for backend in ("cpu", "reference"):
        with LiveMemory(q) as memory:
            surgery.attention.sk.flash_attn_stats(q, q, q, backend=backend)
        peaks[backend] = memory.peak
    assert peaks["reference"] > 2 * 64 * 64 * 4 > peaks["cpu"] - 2 * q.nbytes


def test_live_memory_agrees_with_the_estimate():
    """The same step on real and on fake tensors; temporaries inside our operators are the difference."""
    model = AutoModelForCausalLM.from_config(shape_config(AutoConfig.for_model(**WIDE))).train()
    ids = torch.zeros(2, 200, dtype=torch.int64)
    with LiveMemory(model.parameters(), model.buffers()) as memory:
        # transformers 4.57 takes a batch without a mask for a packed one, and materialises that mask
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss.backward()
    estimate = estimate_step(
        AutoConfig.for_model(**WIDE), method="plain", task_batch=2, task_length=200, dtype="float32", optimizer="none"
    )
    assert estimate.total == pytest.approx(memory.peak, rel=0.01)


@pytest.mark.parametrize("options", [{"gradients_resident": True}, {"lora": 4}], ids=["accumulation", "lora"])
def test_surgery_costs_no_memory_when_gradients_are_resident(options):
    if "lora" in options:
        pytest.importorskip("peft")
    plain, ours = (
        estimate_step(
            AutoConfig.for_model(**WIDE), method=method, task_batch=2, task_length=128, probe_length=128, **options
        )
        for method in ("plain", "surgery")
    )
    # the probe's masks and records are a few bytes a token
    assert ours.total <= 1.01 * plain.total
    assert ours.gradients == plain.gradients > 0


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
def test_paper_is_quadratic_in_length_and_surgery_linear(checkpointing):
    lengths = (512, 1024, 2048)
    growth = {}
    for method in ("surgery", "paper"):
        a, b, c = (
            estimate_step(
                AutoConfig.for_model(**WIDE),
                method=method,
                task_length=n,
                probe_length=n,
                checkpointing=checkpointing,
                gradients_resident=True,
            ).activations
            for n in lengths
        )
        # increments: equal steps of a linear curve double here, those of a quadratic one quadruple
        growth[method] = (c - b) / (b - a)
    assert growth["surgery"] == pytest.approx(2.0, rel=0.02)
    assert growth["paper"] == pytest.approx(4.0, rel=0.1)


def test_estimate_of_a_public_shape():
    """Llama-3.2-1B has 1 235 814 400 parameters."""
    estimate = estimate_step("llama3.2-1b", method="plain", task_length=64, dtype="bfloat16")
    assert estimate.parameters == pytest.approx(2 * 1235814400, abs=1000)
    assert estimate.optimizer == 4 * 1235814400
    assert estimate.total == estimate.parameters + estimate.optimizer + estimate.activations


def test_estimate_of_one_rank():
    """Shares by hand: what each engine divides, copies and gathers; the activations are the rank's own."""
    options = {"task_length": 64, "probe_length": 64, "dtype": "bfloat16"}
    config = AutoConfig.for_model(**WIDE)
    whole = estimate_step(config, gradients_resident=True, **options)
    model = AutoModelForCausalLM.from_config(config)
    numbers = sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    buffers = whole.parameters - 2 * numbers
    assert 0 <= buffers < 1000
    found = {
        name: estimate_step(config, engine=name, ranks=4, **options) for name in ("ddp", "fsdp2", "zero2", "zero3")
    }
    assert all(one.activations == whole.activations for one in found.values())
    parts = {name: (e.parameters - buffers, e.gradients, e.optimizer, e.engine) for name, e in found.items()}
    gathered = 2 * (numbers - (config.num_hidden_layers - 2) * layer)
    assert parts == {
        "ddp": (2 * numbers, 2 * numbers, 4 * numbers, 2 * numbers),
        "fsdp2": (numbers // 2, numbers // 2, numbers, gathered),
        "zero2": (2 * numbers, numbers // 2, 3 * numbers, 0),
        "zero3": (numbers // 2, numbers // 2, 3 * numbers, gathered),
    }
    assert estimate_step(config, engine="fsdp2", ranks=1, **options) == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "method must be one of plain, surgery, paper, got 'magic'"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"optimizer": "sgd"}, "optimizer must be one of"),
        ({"task_batch": 0}, "task_batch must be an int >= 1, got 0"),
        ({"probe_length": 1}, "probe_length must be an int >= 2, got 1"),
        ({"task_length": 5000}, "task_length must be at most 4096"),
        ({"lora": 0}, "lora must be a rank >= 1"),
        ({"engine": "megatron"}, "engine must be one of none, ddp, fsdp2, zero2, zero3"),
        ({"engine": "fsdp2", "ranks": 0}, "ranks must be an int >= 1"),
        ({"ranks": 2}, "1 without an engine, got 2"),
        ({"engine": "ddp", "gradients_resident": False}, "gradients_resident must be left out"),
    ],
)
def test_estimate_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        estimate_step(AutoConfig.for_model(**WIDE), **options)


def test_estimate_rejects_unknown_models(tmp_path):
    with pytest.raises(ValueError, match="known shapes are smollm2-135m"):
        estimate_step(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="unknown model family 'gpt2'"):
        estimate_step(AutoConfig.for_model("gpt2"))


@pytest.mark.parametrize("loop", [True, False], ids=["loop", "stacked"])
@pytest.mark.parametrize(
    ("harmful", "refusal"), [((20,), (14,)), ((9, 9), (20, 20)), ((20, 5), (7, 14))], ids=["pair", "batch", "padded"]
)
def test_paper_penalty_equals_the_regularizer(harmful, refusal, loop):
    model = tiny_llama()
    batches = probe_batch(harmful, 1), probe_batch(refusal, 2)
    reg = surgery.SurgeryRegularizer(model, surgery.SurgeryConfig(lambda_sink=300.0, sinks=1))
    loss = reg(*batches)
    wanted = gradients_of(model, loss)
    with eager_attention(model):
        value = paper_penalty(model, *batches, 300.0, loop=loop)
        got = gradients_of(model, value)
    assert wanted.norm() > 0
    torch.testing.assert_close(value, loss.detach(), rtol=1e-5, atol=1e-6)
    assert (got - wanted).norm() <= 1e-5 * wanted.norm()


def test_paper_penalty_with_a_row_mask():
    model = tiny_llama()
    batches = [probe_batch((20, 12), 1), probe_batch((16, 16), 2)]
    for batch in batches:
        batch["row_mask"] = batch["attention_mask"].clone()
        batch["row_mask"][:, :6] = 0
    loss = surgery.SurgeryRegularizer(model, surgery.SurgeryConfig(sinks=1, rows="response"))(*batches)
    with eager_attention(model), torch.no_grad():
        value = paper_penalty(model, *batches)
    torch.testing.assert_close(value, loss.detach(), rtol=1e-5, atol=1e-6)


def test_eager_attention_is_put_back():
    model = tiny_llama()
    with pytest.raises(RuntimeError, match="stop"), eager_attention(model):
        assert model.config._attn_implementation == "eager"
        raise RuntimeError("stop")
    assert model.config._attn_implementation == "surgery"


def test_paper_penalty_refuses_what_would_be_silent():
    model = tiny_llama()
    batch = probe_batch((8, 8), 1)
    with pytest.raises(ValueError, match="attention maps need eager attention"):
        paper_penalty(model, batch, batch)
    left = {"input_ids": batch["input_ids"], "attention_mask": probe_batch((8, 5), 1)["attention_mask"].flip(1)}
    with eager_attention(model):
        with pytest.raises(ValueError, match="padded on the left"):
            paper_penalty(model, left, batch)
        with pytest.raises(ValueError, match=r"no row counts in sequences \[1\]"):
            paper_penalty(model, probe_batch((8, 1), 1), batch)
        model.gradient_checkpointing_enable({"use_reentrant": True})
        with pytest.raises(RuntimeError, match="reentrant checkpointing loses it silently"):
            paper_penalty(model, batch, batch)
