"""Sink mass, sink divergence and sink positions of a model on batches of text, without gradient."""

import torch

from .masks import padding_bounds
from .parallel import all_heads, sum_of_heads
from .patch import SPLIT, attention_modules, check_patched
from .probe import Probe
from .rows import as_probe_batch, prepare


def sink_mass(model, input_ids, attention_mask=None, rows="non_sink", sinks=1, row_mask=None):
    """Mean attention on the sink keys, per layer, sequence and head: alpha_h of the paper's eq. 2. No gradient.

    Args:
        model: a patched model (see `patch_model`), wrapped or not; its train/eval mode is left as it is.
        input_ids: [B, T] int64.
        attention_mask: [B, T], one contiguous run of ones a row; default all ones.
        rows: query rows that count: "non_sink", "response" (within row_mask) or "all".
        sinks: int n for the first n tokens, positions from each sequence's first real token (a sequence of ints or
            an int tensor [B, n]), or "argmax": the token of largest total attention mass, for each sequence.
        row_mask: [B, T], restricts the rows.
    Returns:
        [L, B, H] fp32.
    Raises:
        ValueError: the model is not patched, wrong shapes or options, a sequence in which no row counts.
        RuntimeError: a layer wrote no statistic, or its activations are NaN.
    """
    batch = {"input_ids": input_ids}
    for key, mask in (("attention_mask", attention_mask), ("row_mask", row_mask)):
        if mask is not None:
            batch[key] = mask
    base = check_patched(model)
    batch = as_probe_batch(batch)
    if isinstance(sinks, str):
        if sinks != "argmax":
            raise ValueError(f"sinks must be an int, positions or 'argmax', got {sinks!r}")
        sinks = find_sinks(model, batch)[:, None]
    with torch.no_grad():
        probe = mass_probe(base, batch, sinks, rows)
        run_probe(model, base, batch, probe)
    check_finite(probe.recorded)
    return all_heads(base, probe.recorded)


def sink_divergence(harmful, refusal):
    """d = mean alpha on harmful sequences minus mean alpha on refusals (paper, eq. 3).

    Args:
        harmful, refusal: [L, B, H] from `sink_mass`; the numbers of sequences may differ.
    Returns:
        [L, H]. Positive: the head leans on the sink more for harmful text.
    Raises:
        ValueError: other dimensions or heads.
    """
    if harmful.dim() != 3 or refusal.dim() != 3 or harmful.shape[::2] != refusal.shape[::2]:
        raise ValueError(f"need two [L, B, H] with the same L and H, got {[*harmful.shape]} and {[*refusal.shape]}")
    return harmful.mean(1) - refusal.mean(1)


def find_sinks(model, batch):
    """The sink token of each sequence: argmax of the attention it receives in total (paper, eq. 1). No gradient.

    Summed over layers, heads and real query rows, in O(T) memory.

    Args:
        model: a patched model.
        batch: what a tokenizer returns, see `rows.as_probe_batch`.
    Returns:
        int32 [B], positions from each sequence's first real token.
    Raises:
        NonFiniteStatistic: NaN activations.
    """
    base = check_patched(model)
    batch = as_probe_batch(batch)
    bounds = padding_bounds(batch.mask)
    columns = torch.full((len(attention_modules(base)), *batch.mask.shape), float("nan"), device=bounds.device)
    probe = Probe("columns", columns, bounds, batch.mask.float(), None, 1)
    with torch.no_grad():
        run_probe(model, base, batch, probe)
    check_finite(columns)
    columns = sum_of_heads(base, columns)
    # padding receives no attention, so its columns hold 0 and are never the largest
    return (columns.sum(0).argmax(-1) - bounds[:, 0]).to(torch.int32)


def mass_probe(base, batch, sinks, rows, kind="mass", n_harmful=0, share=None, positive=None):
    """A Probe that records alpha [L, B, H] of `batch`, H this rank's heads; checks sinks and rows."""
    bounds, positions, n_sinks, weight = prepare(batch, sinks, rows)
    config = base.config.get_text_config()
    heads = config.num_attention_heads // (getattr(base, "_tp_size", None) or 1)
    shape = (len(attention_modules(base)), batch.mask.shape[0], heads)
    recorded = torch.full(shape, float("nan"), device=bounds.device)
    return Probe(kind, recorded, bounds, weight, positions, n_sinks, n_harmful, share, positive)


def run_probe(model, base, batch, probe):
    """Forward `batch` through `model` with `probe`, and check that every layer recorded. Returns the logits.

    Raises:
        RuntimeError: a layer wrote no statistic: a wrapper dropped the keyword or replaced the attention.
    """
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.mask}
    if (probe.bounds[:, 0] > 0).any():
        # models count positions from the first column; with left padding the first real token is 0
        inputs["position_ids"] = (batch.mask.long().cumsum(1) - 1).clamp_min(0)
    probe.split = getattr(base, SPLIT, None)
    if probe.split is not None:
        inputs = probe.split.inputs(batch, probe)
    logits = model(**inputs, use_cache=False, logits_to_keep=1, surgery_ctx=probe).logits
    silent = probe.recorded.isnan().flatten(1).any(1)
    if silent.any():
        layers = silent.nonzero()[:, 0].tolist()
        raise RuntimeError(
            f"layers {layers} of {type(base).__name__} wrote no attention statistic: the keyword surgery_ctx did not "
            f"reach their attention function"
        )
    return logits


class NonFiniteStatistic(RuntimeError):
    """The model's activations on a probe are NaN or infinite."""


def check_finite(recorded):
    """Raise NonFiniteStatistic if `recorded` [L, ...] is not finite anywhere."""
    bad = (~recorded.isfinite()).flatten(1).any(1)
    if bad.any():
        raise NonFiniteStatistic(
            f"layers {bad.nonzero()[:, 0].tolist()}: the model's activations on the probe are NaN or infinite. "
            f'SurgeryConfig(nonfinite="drop") leaves such a probe out and counts it'
        )
