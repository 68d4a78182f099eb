"""Tiny random models, batches and the eager truth that the model and training tests share."""

import random

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from surgery.families import FAMILIES, TINY
from surgery.rows import as_probe_batch, join
from surgery.verify import eager_penalty


def tiny_model(family="llama", attention="eager", seed=0, dtype=torch.float32, **overrides):
    """A random model of `family` with peaky attention, in train mode."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**TINY, **FAMILIES[family].tiny, **overrides})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and any(part in name for part in ("q_proj", "k_proj", "qkv_proj")):
            parameter.data *= 8
    return model.train()


def probe_batches(n_harmful=2, n_refusal=3, left=False, row_mask=False):
    """Two padded batches of different lengths; `left` pads on the left."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for count, length in ((n_harmful, 13), (n_refusal, 10)):
        mask = torch.ones(count, length, dtype=torch.long)
        for row in range(1, count):
            hidden = slice(0, 2 + row) if left else slice(length - 2 - row, length)
            mask[row, hidden] = 0
        batch = {"input_ids": torch.randint(3, 97, (count, length), generator=generator), "attention_mask": mask}
        if row_mask:
            batch["row_mask"] = (mask.cumsum(1) > 3) & mask.bool()
        batches.append(batch)
    return batches


def eager_truth(model, harmful, refusal, sinks=1, rows="non_sink", lambda_sink=300.0):
    """(penalty, gradients by name) from output_attentions=True autograd of an eager model."""
    model.zero_grad()
    batch = join(as_probe_batch(harmful), as_probe_batch(refusal))
    n_harmful = torch.as_tensor(harmful["input_ids"]).shape[0]
    penalty = eager_penalty(model, batch, n_harmful, sinks, rows, lambda_sink)
    penalty.backward()
    found = gradients(model)
    model.zero_grad()
    return penalty.item(), found


def gradients(model, scale=1.0):
    """dict parameter name -> gradient / scale, for parameters that have one."""
    named = model.named_parameters()
    return {_plain(name): p.grad.clone() / scale for name, p in named if p.grad is not None}


def _plain(name):
    return name.replace("_orig_mod.", "")


def worst_error(found, truth):
    """Largest relative error of any parameter's gradient; a missing gradient counts as zero."""
    assert all(x.isfinite().all() for x in found.values())
    largest = max(x.norm() for x in truth.values())
    errors = [
        (found.get(name, torch.zeros_like(expected)) - expected).norm() / expected.norm()
        for name, expected in truth.items()
        if expected.norm() > 1e-6 * largest
    ]
    return max(errors).item()


WORDS = tuple(f"w{i}" for i in range(80))
CHAT_TEMPLATE = (
    "<s> {% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def tiny_tokenizer(chat_template=CHAT_TEMPLATE):
    """Whole words to ids below TINY's vocabulary size; like Llama's it adds a first token to plain text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ("<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>")
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def rows(count, seed, prompt_words=3, response_words=5):
    """Rows of random words, of varying length."""
    generator = random.Random(seed)

    def words(n):
        return " ".join(generator.choices(WORDS, k=n))

    return [{"prompt": words(prompt_words + i % 3), "response": words(response_words + i % 4)} for i in range(count)]
