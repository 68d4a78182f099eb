"""TRL's trainers with SurgeryCallback: an exact gradient, and reference models and generation left as they are."""

import pytest
import torch
from tiny import WORDS, rows, tiny_model, tiny_tokenizer
from trl_cases import OPTIONS, check

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")


def chats(count):
    return [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["response"]}]}
        for r in rows(count, seed=5)
    ]


@pytest.mark.parametrize(
    "options",
    ({}, {"padding_free": True}, {"packing": True, "packing_strategy": "bfd"}),
    ids=("padded", "padding-free", "packed"),
)
def test_sft(tmp_path, options):
    config = trl.SFTConfig(
        str(tmp_path), logging_steps=1, max_length=None if "padding_free" in options else 48, **OPTIONS, **options
    )
    data = datasets.Dataset.from_list(chats(12))
    check(lambda model: trl.SFTTrainer(model, args=config, train_dataset=data, processing_class=tiny_tokenizer()))


def test_dpo(tmp_path):
    pairs = [
        {"prompt": a["prompt"], "chosen": a["response"], "rejected": b["response"]}
        for a, b in zip(rows(8, seed=5), rows(8, seed=6), strict=True)
    ]
    data = datasets.Dataset.from_list(pairs)
    config = trl.DPOConfig(str(tmp_path), logging_steps=1, max_length=48, **OPTIONS)
    seen = []

    def make(model):
        reference = tiny_model(attention="sdpa", seed=1).eval()
        reference.register_forward_hook(lambda m, *_: seen.append(m.config._attn_implementation))
        return trl.DPOTrainer(model, reference, args=config, train_dataset=data, processing_class=tiny_tokenizer())

    _, ours = check(make)
    assert set(seen) == {"sdpa"} and len(seen) >= 4
    weights = tiny_model(attention="sdpa", seed=1).state_dict()
    assert all(torch.equal(weights[name], value) for name, value in ours.ref_model.state_dict().items())


def test_grpo(tmp_path):
    """Completions are the plain run's: the probe neither moves the random numbers nor changes generation."""
    data = datasets.Dataset.from_list([{"prompt": r["prompt"]} for r in rows(8, seed=5)])
    completed = []

    def reward(completions, **kwargs):
        completed[-1].extend(completions)
        return [float(len(set(c.split()) & set(WORDS[:40]))) for c in completions]

    config = trl.GRPOConfig(
        str(tmp_path), logging_steps=1, num_generations=2, max_completion_length=6, beta=0.1, **OPTIONS
    )

    def make(model):
        model.config._name_or_path = str(tmp_path / "model")
        completed.append([])
        tokenizer = tiny_tokenizer()
        # older TRL hands everything the tokenizer returns to generate
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
        return trl.GRPOTrainer(model, reward, args=config, train_dataset=data, processing_class=tokenizer)

    tiny_model(attention="sdpa").save_pretrained(tmp_path / "model")
    _, ours = check(make)
    assert ours.ref_model.config._attn_implementation == "sdpa"
    assert completed[0] == completed[1] and len(completed[0]) >= 4
