"""Greedy answers of a model to a list of prompts, through its chat template or the Alpaca prompt."""

import torch

__all__ = ["generate_answers"]

TEMPLATES = ("chat", "alpaca")
# of Stanford Alpaca, as the git-disl family asks for its safety evaluation
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:\n"
)


def generate_answers(
    model,
    tokenizer,
    prompts,
    max_new_tokens=48,
    batch_size=8,
    system=None,
    progress=False,
    template="chat",
):
    """Answer every prompt greedily.

    The tokenizer is only read: padding is done here, on the left. The train/eval mode of every module is
    put back afterwards, also after an error. The KV cache is used, so a model whose attention is patched
    for statistics has to be unpatched first.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer, with a chat template.
        prompts: sequence of str, the user turns.
        max_new_tokens: int >= 1, cut after this many tokens; an end token stops a row earlier.
        batch_size: int >= 1, prompts a forward pass.
        system: str or None, the system turn; None leaves it to the template (which may add its own).
        progress: bool, show a tqdm bar.
        template: "chat" for the tokenizer's own, or "alpaca": the Alpaca prompt, with the special tokens that the
            tokenizer adds to plain text.
    Returns:
        list of str, one answer a prompt in the order given, stripped, without special tokens.
    Raises:
        ValueError: if prompts is empty or one string, a size is below 1, the template is unknown or takes no
            system turn, or the tokenizer has no chat template.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts must be a sequence of strings, got one string")
    prompts = list(prompts)
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, got none")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if template not in TEMPLATES:
        raise ValueError(f"template must be one of {', '.join(TEMPLATES)}, got {template!r}")
    if template == "alpaca" and system is not None:
        raise ValueError("the Alpaca prompt has no system turn; got a system text")
    if template == "chat" and getattr(tokenizer, "chat_template", None) is None:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise ValueError(f"tokenizer {name!r} has no chat template; use a chat model or set the template")

    end_ids = _end_token_ids(model, tokenizer)
    pad_id = tokenizer.pad_token_id
    if pad_id is None:
        pad_id = end_ids[0] if end_ids else 0
    settings = dict(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        use_cache=True,
        eos_token_id=end_ids or None,
        pad_token_id=pad_id,
    )
    starts = range(0, len(prompts), batch_size)
    if progress:
        from tqdm.auto import tqdm

        starts = tqdm(starts, desc="answers", unit="batch")

    answers = []
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            for start in starts:
                batch = prompts[start : start + batch_size]
                rows = [_prompt_ids(tokenizer, prompt, system, template) for prompt in batch]
                input_ids, attention_mask = _left_pad(rows, pad_id, model.device)
                output = model.generate(input_ids=input_ids, attention_mask=attention_mask, **settings)
                new_ids = output[:, input_ids.shape[1] :]
                texts = tokenizer.batch_decode(new_ids, skip_special_tokens=True)
                answers.extend(text.strip() for text in texts)
    finally:
        for module, mode in modes:
            module.training = mode
    return answers


def _prompt_ids(tokenizer, prompt, system, template):
    """Token ids (list of int) of one prompt, up to and with the opening of the assistant's turn."""
    if template == "alpaca":
        return tokenizer(_ALPACA.replace("{prompt}", prompt))["input_ids"]
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # the template writes the special tokens itself: adding them again would double the first one
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _left_pad(rows, pad_id, device):
    """Pad lists of token ids on the left.

    Args:
        rows: list of B lists of int.
        pad_id: int, the filler.
        device: where the tensors go.
    Returns:
        input_ids [B, T] int64, attention_mask [B, T] int64 with 1 for real tokens.
    """
    longest = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    attention_mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for i, row in enumerate(rows):
        input_ids[i, longest - len(row) :] = torch.tensor(row, dtype=torch.long)
        attention_mask[i, longest - len(row) :] = 1
    return input_ids.to(device), attention_mask.to(device)


def _end_token_ids(model, tokenizer):
    """Sorted ids that end an answer: the tokenizer's and those of the model's generation config."""
    ids = set()
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    for value in (tokenizer.eos_token_id, configured):
        if value is not None:
            ids.update(value if isinstance(value, (list, tuple)) else [value])
    return sorted(ids)
