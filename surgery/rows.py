"""From tokenised batches to one padded probe batch: which rows count, and where the sinks are. Policy, no kernels."""

from typing import NamedTuple

import torch
from torch import Tensor

from .masks import padding_bounds

ROW_POLICIES = ("non_sink", "response", "all")
BATCH_KEYS = ("input_ids", "attention_mask", "row_mask")
# what tokenizers also return and a causal model does not need
IGNORED_KEYS = ("token_type_ids", "labels", "special_tokens_mask")


class ProbeBatch(NamedTuple):
    """A padded batch of probe sequences.

    Attributes:
        input_ids: [B, T] int64.
        mask: [B, T] bool, true on real tokens, one contiguous run a row.
        row_mask: [B, T] bool or None: the rows the caller selected.
    """

    input_ids: Tensor
    mask: Tensor
    row_mask: Tensor | None

    def to(self, device):
        return ProbeBatch(*(None if x is None else x.to(device) for x in self))


def as_probe_batch(batch, name="batch"):
    """Check what a tokenizer returned and give it its defaults.

    Args:
        batch: mapping with input_ids [B, T], optionally attention_mask [B, T] and row_mask [B, T] (1 or true: this
            query row counts), or a ProbeBatch.
        name: how errors call it.
    Returns:
        ProbeBatch.
    Raises:
        ValueError: unknown keys, wrong shapes, an empty batch, a sequence without a token.
    """
    if isinstance(batch, ProbeBatch):
        return batch
    unknown = sorted(set(batch) - set(BATCH_KEYS) - set(IGNORED_KEYS))
    if unknown or "input_ids" not in batch:
        raise ValueError(f"{name} needs input_ids and may have {BATCH_KEYS[1:]}, got {sorted(batch)}")
    input_ids = torch.as_tensor(batch["input_ids"])
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(f"{name}['input_ids'] must be [B, T] with B, T >= 1, got {tuple(input_ids.shape)}")
    masks = []
    for key in ("attention_mask", "row_mask"):
        mask = batch.get(key)
        mask = None if mask is None else torch.as_tensor(mask)
        if mask is not None and mask.shape != input_ids.shape:
            raise ValueError(f"{name}[{key!r}] must be {tuple(input_ids.shape)} as input_ids, got {tuple(mask.shape)}")
        masks.append(None if mask is None else mask.to(input_ids.device).bool())
    mask = torch.ones_like(input_ids, dtype=torch.bool) if masks[0] is None else masks[0]
    empty = (~mask.any(1)).nonzero()[:, 0].tolist()
    if empty:
        raise ValueError(f"{name}: sequences {empty} have no token (attention_mask is all zero)")
    return ProbeBatch(input_ids, mask, masks[1])


def join(harmful, refusal):
    """One ProbeBatch of [harmful; refusal] rows, the shorter padded on the right."""
    length = max(harmful.input_ids.shape[1], refusal.input_ids.shape[1])
    row_mask = None
    if harmful.row_mask is not None or refusal.row_mask is not None:
        row_mask = torch.cat([_pad(b.mask if b.row_mask is None else b.row_mask, length) for b in (harmful, refusal)])
    return ProbeBatch(
        torch.cat([_pad(b.input_ids, length) for b in (harmful, refusal)]),
        torch.cat([_pad(b.mask, length) for b in (harmful, refusal)]),
        row_mask,
    )


def _pad(x, length):
    return torch.nn.functional.pad(x, (0, length - x.shape[1]))


def sink_positions(sinks, bounds):
    """The sinks as the kernels take them.

    Args:
        sinks: int n >= 1 for the first n tokens; a sequence of positions; or an int tensor [B, n] of positions.
        bounds: int32 [B, 2].
    Returns:
        (positions int32 [B, n], or None for the first n keys, n).
    Raises:
        ValueError: a position outside a sequence.
    """
    lengths = bounds[:, 1] - bounds[:, 0]
    if isinstance(sinks, int) and not isinstance(sinks, bool):
        if sinks < 1:
            raise ValueError(f"sinks must be at least 1 key, got {sinks}")
        return None, sinks
    positions = torch.as_tensor(sinks, dtype=torch.int32, device=bounds.device)
    if positions.dim() == 1:
        positions = positions.expand(bounds.shape[0], -1)
    if positions.dim() != 2 or positions.shape[0] != bounds.shape[0] or positions.shape[1] == 0:
        raise ValueError(f"sinks must be an int, positions or [{bounds.shape[0]}, n], got {tuple(positions.shape)}")
    outside = ((positions < 0) | (positions >= lengths[:, None])).any(1)
    if outside.any():
        row = int(outside.nonzero()[0, 0])
        raise ValueError(
            f"sinks {positions[row].tolist()} lie outside sequence {row}, which has {int(lengths[row])} tokens"
        )
    count = positions.shape[1]
    # the vendors' kernels take sinks at the front only, and nearly every model has its own there
    if bool((positions == torch.arange(count, device=positions.device)).all()):
        return None, count
    return positions.contiguous(), count


def row_weights(batch, bounds, positions, n_sinks, rows):
    """Weight of each query row in its sequence's mean.

    Args:
        batch: ProbeBatch.
        bounds: int32 [B, 2]; positions, n_sinks: from `sink_positions`.
        rows: "non_sink" every real row but the sinks' own (N_k of the paper's eq. 2), "response" the same within
            row_mask, which must be given, "all" every real row. A row_mask always restricts.
    Returns:
        [B, T] fp32, each sequence sums to 1.
    Raises:
        ValueError: unknown policy, no row_mask for "response", a sequence in which no row counts.
    """
    if rows not in ROW_POLICIES:
        raise ValueError(f"rows must be one of {ROW_POLICIES}, got {rows!r}")
    if rows == "response" and batch.row_mask is None:
        raise ValueError("rows='response' needs a row_mask [B, T] in both batches that marks the response tokens")
    counted = batch.mask if batch.row_mask is None else batch.mask & batch.row_mask
    if rows != "all":
        offset = torch.arange(counted.shape[1], device=counted.device) - bounds[:, :1]
        if positions is None:
            is_sink = (offset >= 0) & (offset < n_sinks)
        else:
            is_sink = (offset[:, :, None] == positions[:, None, :]).any(-1)
        counted = counted & ~is_sink
    total = counted.sum(1)
    if (total == 0).any():
        empty = (total == 0).nonzero()[:, 0].tolist()
        raise ValueError(
            f"no query row counts in probe sequences {empty} under rows={rows!r}: the sequence is too short, or its "
            f"response was cut off"
        )
    return counted.float() / total[:, None]


def shares(count, n_harmful, totals=None):
    """Each sequence's share in d: 1 / harmful sequences, or -1 / refusals (paper, eq. 3).

    Args:
        count: sequences of the batch, the first `n_harmful` of them harmful.
        totals: (harmful, refusal) sequences in all, where the batch is a part; default: those of the batch.
    Returns:
        [count] fp32.
    """
    harmful, refusal = totals or (n_harmful, count - n_harmful)
    return torch.tensor([1.0 / harmful] * n_harmful + [-1.0 / refusal] * (count - n_harmful))


def prepare(batch, sinks, rows):
    """(bounds, positions, n_sinks, row_weight) of a ProbeBatch, checked."""
    bounds = padding_bounds(batch.mask)
    positions, n_sinks = sink_positions(sinks, bounds)
    return (
        bounds,
        positions,
        min(n_sinks, batch.mask.shape[1]),
        row_weights(batch, bounds, positions, n_sinks, rows),
    )
