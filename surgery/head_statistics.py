"""Every statistic of every head in one forward: sink mass, entropy and max logit. Values, no gradient."""

import surgery_kernels as sk
import torch

from .patch import check_patched
from .probe import Probe
from .rows import as_probe_batch
from .statistics import find_sinks, mass_probe, run_probe


class _StatsProbe(Probe):
    """Records [S, B, H] per layer: the mean over counted rows of each statistic, of max_logit their largest."""

    def __init__(self, probe, stats):
        super().__init__("stats", probe.recorded, probe.bounds, probe.row_weight, probe.sinks, probe.n_sinks)
        self.stats = stats
        layers, *batch_and_heads = probe.recorded.shape
        self.recorded = probe.recorded.new_full((layers, len(stats), *batch_and_heads), float("nan"))

    def record(self, layer, rows):
        weight = self.row_weight[:, None]
        for i, name in enumerate(self.stats):
            values = rows[name].detach().float()
            if name == "max_logit":
                self.recorded[layer, i] = values.masked_fill(weight == 0, float("-inf")).amax(-1)
            else:
                self.recorded[layer, i] = (values * weight).sum(-1)


def head_statistics(model, batch, rows="non_sink", sinks=1, stats=tuple(sk.STATS)):
    """Statistics of every head on a batch of sequences. No gradient.

    Args:
        model: a patched model.
        batch: what a tokenizer returns, see `rows.as_probe_batch`.
        rows, sinks: as `statistics.sink_mass` takes them.
        stats: names out of surgery_kernels.STATS.
    Returns:
        (dict name -> [L, B, H] fp32, sink positions int32 [B, n] or None for the first n). sink_mass and entropy
        (nats) are means over the counted rows, max_logit is the largest of them.
    Raises:
        ValueError: the model is not patched, an unknown statistic, bad batches or options.
        RuntimeError: a layer wrote no statistic.
    """
    unknown = sorted(set(stats) - set(sk.STATS))
    if unknown or not stats:
        raise ValueError(f"stats must be names out of {', '.join(sk.STATS)}, got {list(stats)}")
    base = check_patched(model)
    batch = as_probe_batch(batch)
    found = find_sinks(model, batch)[:, None] if sinks == "argmax" else None
    with torch.no_grad():
        probe = _StatsProbe(mass_probe(base, batch, sinks if found is None else found, rows), tuple(stats))
        run_probe(model, base, batch, probe)
    return {name: probe.recorded[:, i] for i, name in enumerate(stats)}, probe.sinks if found is None else found
