"""Statistics of every head of a model on sets of texts: one value a sequence, and the divergence of two sets."""

from dataclasses import dataclass

import numpy as np
import torch

from .data import RowEncoder, collate, encode_rows, read_rows
from .head_statistics import head_statistics
from .patch import patched

# of Gu et al.'s sink rate
SINK_EPSILON = 0.3


@dataclass(frozen=True)
class Measurement:
    """alpha of every sequence, and what follows from it.

    Attributes:
        harmful, refusal: [L, N, H] fp32 alpha of each sequence.
    """

    harmful: np.ndarray
    refusal: np.ndarray

    @property
    def divergence(self):
        """[L, H] mean harmful minus mean refusal alpha."""
        return self.harmful.mean(1) - self.refusal.mean(1)

    @property
    def standard_error(self):
        """[L, H] standard error of the divergence, sequences taken as independent."""
        return np.sqrt(sum(x.var(1, ddof=1) / x.shape[1] for x in (self.harmful, self.refusal)))

    def summary(self):
        """JSON types: counts, means, and heads beyond two standard errors."""
        d, error = self.divergence, self.standard_error
        strong = np.abs(d) > 2 * error
        return {
            "heads": int(d.size),
            "positive_heads": int((d > 0).sum()),
            "significant_heads": int(strong.sum()),
            "significant_positive_heads": int((strong & (d > 0)).sum()),
            "mean_relu_divergence": float(np.maximum(d, 0).mean()),
            "max_divergence": float(d.max()),
            "sink_mass_harmful": float(self.harmful.mean()),
            "sink_mass_refusal": float(self.refusal.mean()),
            "sequences_harmful": int(self.harmful.shape[1]),
            "sequences_refusal": int(self.refusal.shape[1]),
        }


@dataclass(frozen=True)
class HeadValues:
    """Statistics of every head on one set of texts.

    Attributes:
        stats: dict name -> [L, N, H] fp32, one value a sequence (see `head_statistics`); sink_mass is alpha.
        lengths: [N] int tokens of each sequence after truncation, of its response with rows="response".
        sinks: [N] int position of its first sink.
    """

    stats: dict
    lengths: np.ndarray
    sinks: np.ndarray

    @property
    def alpha(self):
        """[L, N, H] mean attention on the sink."""
        return self.stats["sink_mass"]

    def sink_rate(self, epsilon=SINK_EPSILON):
        """[N] share of heads with alpha > epsilon, for each sequence.

        The mean is the sink rate of Gu et al. (arXiv 2410.10781) where sinks=1, rows="all" and all sequences are
        cut to the same length (theirs: 64 tokens).
        """
        return (self.alpha > epsilon).mean((0, 2))


def measure_sets(model, tokenizer, sets, config, limit=None, batch_size=8, stats=("sink_mass",), progress=False):
    """Measure several sets of texts; the model is patched meanwhile and in eval mode.

    Args:
        model, tokenizer: a causal language model of a known family.
        sets: dict name -> rows, see `data.read_rows`.
        config: SurgeryConfig, for sinks, rows, max_length, chat and backend.
        limit: at most so many rows of each set.
        batch_size: sequences a forward.
        stats: names out of surgery_kernels.STATS, sink_mass among them.
    Returns:
        dict name -> HeadValues.
    Raises:
        ValueError: bad rows, fewer than two in a set.
    """
    encoder = RowEncoder(tokenizer, config.max_length, config.chat, config.double_bos)
    encoded = {name: encode_rows(read_rows(source, limit), encoder, config, name) for name, source in sets.items()}
    for name, rows in encoded.items():
        if len(rows) < 2:
            raise ValueError(f"{name}: at least 2 rows are needed for a standard error, got {len(rows)}")
    was_training = model.training
    model.eval()
    try:
        with patched(model, config.backend):
            return {
                name: _head_values(model, rows, config, batch_size, tokenizer.pad_token_id or 0, stats, name, progress)
                for name, rows in encoded.items()
            }
    finally:
        model.train(was_training)


def measure(model, tokenizer, harmful, refusal, config, limit=None, batch_size=8, progress=False):
    """alpha on harmful rows and on refusals, see `measure_sets`. Returns Measurement."""
    sets = {"harmful": harmful, "refusal": refusal}
    values = measure_sets(model, tokenizer, sets, config, limit, batch_size, progress=progress)
    return Measurement(values["harmful"].alpha, values["refusal"].alpha)


def _head_values(model, encoded, config, batch_size, pad_id, stats, name, progress):
    from tqdm.auto import tqdm

    # batches of like lengths waste no work on padding; the order is undone at the end
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].input_ids))
    device = next(model.parameters()).device
    parts, sinks = [], []
    for start in tqdm(range(0, len(order), batch_size), desc=name, disable=not progress, unit="batch"):
        batch = collate([encoded[i] for i in order[start : start + batch_size]], pad_id, config.rows == "response")
        batch = {key: value.to(device) for key, value in batch.items()}
        values, positions = head_statistics(model, batch, config.rows, config.sinks, stats)
        parts.append({key: value.cpu() for key, value in values.items()})
        size = batch["input_ids"].shape[0]
        sinks.append(torch.zeros(size, dtype=torch.int32) if positions is None else positions[:, 0].cpu())
    restored = torch.empty(len(order), dtype=torch.long)
    restored[order] = torch.arange(len(order))
    whole = {key: torch.cat([part[key] for part in parts], 1)[:, restored].numpy() for key in stats}
    starts = [one.response_start if config.rows == "response" else 0 for one in encoded]
    lengths = np.array([len(one.input_ids) - start for one, start in zip(encoded, starts, strict=True)])
    return HeadValues(whole, lengths, torch.cat(sinks)[restored].numpy())
