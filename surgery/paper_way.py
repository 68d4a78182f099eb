"""The baseline: sink divergence from materialised attention maps, the way the paper's released code computes it.

Written anew from the paper's definitions (eq. 2 to 4, sink token 0, rows 1 and on as released). It is what bench,
demo and verify compare with. Memory and time are quadratic in the length: every layer keeps [B, H, T, T].
"""

from contextlib import contextmanager

import torch

from .probe import unwrap
from .rows import as_probe_batch


@contextmanager
def eager_attention(model):
    """Run `model` on eager attention inside the block, the only kind that returns attention maps.

    Args:
        model: a causal language model, wrapped or not, patched or not.
    Yields:
        The same model; its attention is put back at the end.
    Raises:
        ValueError: the model does not take eager attention.
    """
    base = unwrap(model)
    previous = base.config._attn_implementation
    base.set_attn_implementation("eager")
    if base.config._attn_implementation != "eager":
        raise ValueError(f"{type(base).__name__} cannot be switched from {previous!r} to eager attention")
    try:
        yield model
    finally:
        base.set_attn_implementation(previous)


def paper_penalty(model, harmful, refusal, lambda_sink=300.0, loop=True, sink=0):
    """lambda / |H| * sum_h relu(alpha_h(harmful) - alpha_h(refusal)) from attention maps, differentiable.

        alpha_h(X) = mean over sequences of attn[b, h, 1:, sink].mean()        padded rows left out

    One forward a side, as released, but without the logits that nobody needs: kinder than the original.

    Args:
        model: on eager attention (see `eager_attention`).
        harmful, refusal: input_ids [B, T], optionally attention_mask [B, T] (right padding) and row_mask [B, T].
        lambda_sink: the weight.
        loop: head by head, as released; False stacks the heads of a layer: the same value in far fewer operators.
        sink: position of the sink token; the rows are 1 and on whatever it is, as released.
    Returns:
        Scalar fp32.
    Raises:
        ValueError: the model's attention is not eager, left padding, a sequence in which no row counts.
        RuntimeError: the maps carry no gradient although one is wanted (reentrant checkpointing).
    """
    alpha = _looped_means if loop else _stacked_means
    d = alpha(*_attention_maps(model, harmful, "harmful batch"), sink)
    d = [a - b for a, b in zip(d, alpha(*_attention_maps(model, refusal, "refusal batch"), sink), strict=True)]
    penalty = lambda_sink * torch.relu(torch.stack(d)).mean()
    trainable = any(p.requires_grad for p in model.parameters())
    if torch.is_grad_enabled() and trainable and not penalty.requires_grad:
        raise RuntimeError(
            "the attention maps carry no gradient: reentrant checkpointing loses it silently. "
            "Use gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
    return penalty


def _attention_maps(model, batch, name):
    """(maps: a tuple of [B, H, T, T], counted rows [B, T] bool or None when all but row 0 count)."""
    base = unwrap(model)
    if base.config._attn_implementation != "eager":
        raise ValueError(
            f"attention maps need eager attention, the model has {base.config._attn_implementation!r}: "
            f"wrap the call in `with eager_attention(model):`"
        )
    batch = as_probe_batch(batch, name).to(next(model.parameters()).device)
    if not batch.mask[:, 0].all():
        raise ValueError(f"{name}: the paper's way needs right padding, this one is padded on the left")
    maps = model(
        input_ids=batch.input_ids,
        attention_mask=batch.mask,
        output_attentions=True,
        use_cache=False,
        logits_to_keep=1,
    ).attentions
    if not maps:
        raise ValueError(f"{type(base).__name__} returned no attention maps")
    counted = batch.mask if batch.row_mask is None else batch.mask & batch.row_mask
    counted = counted & (torch.arange(counted.shape[1], device=counted.device) > 0)
    empty = (~counted.any(1)).nonzero()[:, 0].tolist()
    if empty:
        raise ValueError(f"{name}: no row counts in sequences {empty}")
    return maps, None if bool(counted[:, 1:].all()) else counted


def _looped_means(maps, counted, sink):
    """List of L * H scalars."""
    means = []
    for attn in maps:
        for h in range(attn.shape[1]):
            if counted is None:
                means.append(attn[:, h, 1:, sink].float().mean())
            else:
                rows = [attn[b, h, counted[b], sink].float().mean() for b in range(attn.shape[0])]
                means.append(torch.stack(rows).mean())
    return means


def _stacked_means(maps, counted, sink):
    """List of L tensors [H]."""
    if counted is None:
        return [attn[:, :, 1:, sink].float().mean((0, 2)) for attn in maps]
    weight = counted.float() / counted.sum(1, keepdim=True) / counted.shape[0]
    return [torch.einsum("bht,bt->h", attn[:, :, :, sink].float(), weight) for attn in maps]
