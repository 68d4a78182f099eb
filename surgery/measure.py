"""Sink divergence of a model on two sets of texts: per head, with standard errors."""

from dataclasses import dataclass

import numpy as np
import torch

from .data import RowEncoder, collate, encode_rows, read_rows
from .patch import patched
from .statistics import sink_mass


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


def measure(model, tokenizer, harmful, refusal, config, limit=None, batch_size=8, progress=False):
    """Measure alpha on both sets; the model is patched meanwhile and in eval mode.

    Args:
        model, tokenizer: a causal language model of a known family.
        harmful, refusal: rows, see `data.read_rows`.
        config: SurgeryConfig, for sinks, rows, max_length, chat and backend.
        limit: at most so many rows of each side.
        batch_size: sequences a forward.
    Returns:
        Measurement.
    Raises:
        ValueError: bad rows, fewer than two on a side.
    """
    encoder = RowEncoder(tokenizer, config.max_length, config.chat, config.double_bos)
    was_training = model.training
    model.eval()
    try:
        with patched(model, config.backend):
            sides = []
            for name, source in (("harmful", harmful), ("refusal", refusal)):
                encoded = encode_rows(read_rows(source, limit), encoder, config, name)
                if len(encoded) < 2:
                    raise ValueError(f"{name}: at least 2 rows are needed for a standard error, got {len(encoded)}")
                sides.append(_alpha(model, encoded, config, batch_size, tokenizer.pad_token_id or 0, name, progress))
    finally:
        model.train(was_training)
    return Measurement(*sides)


def _alpha(model, encoded, config, batch_size, pad_id, name, progress):
    from tqdm.auto import tqdm

    # batches of like lengths waste no work on padding; the order is undone at the end
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].input_ids))
    device = next(model.parameters()).device
    parts = []
    for start in tqdm(range(0, len(order), batch_size), desc=name, disable=not progress, unit="batch"):
        batch = collate([encoded[i] for i in order[start : start + batch_size]], pad_id, config.rows == "response")
        batch = {key: value.to(device) for key, value in batch.items()}
        parts.append(sink_mass(model, **batch, rows=config.rows, sinks=config.sinks).cpu())
    restored = torch.empty(len(order), dtype=torch.long)
    restored[order] = torch.arange(len(order))
    return torch.cat(parts, 1)[:, restored].numpy()
