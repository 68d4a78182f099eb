"""The user's own model and settings against eager autograd, on one small batch."""

import copy
from dataclasses import dataclass

import torch

from .paper_way import eager_attention
from .patch import patched
from .penalty_op import head_divergence, sequence_means
from .probe import unwrap
from .regularizer import SurgeryRegularizer
from .rows import as_probe_batch, join, prepare
from .statistics import find_sinks


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        penalty, eager_penalty: the two values.
        worst_error: largest relative gradient error of any parameter.
        worst_parameter: its name.
        noise_floor: the same error of eager attention itself at the run's precision; 0 in float32.
        tolerance: what worst_error may be.
    """

    penalty: float
    eager_penalty: float
    worst_error: float
    worst_parameter: str
    noise_floor: float
    tolerance: float

    @property
    def passed(self):
        return self.worst_error <= self.tolerance


def verify(model, config, harmful, refusal, autocast=None, tolerance=1e-4):
    """Compare the regulariser's gradients with `output_attentions=True` autograd in float32.

    Args:
        model: float32 causal language model as the run uses it: adapters, checkpointing, wrappers; dropout off.
        config: SurgeryConfig.
        harmful, refusal: small batches (eager attention materialises every map).
        autocast: None or a dtype: the run's autocast, compared with the noise of eager attention under it.
        tolerance: allowed error in float32; under autocast twice the noise floor is allowed.
    Returns:
        Verification.
    """
    device = next(unwrap(model).parameters()).device
    harmful, refusal = (as_probe_batch(batch).to(device) for batch in (harmful, refusal))
    sinks = config.sinks
    if sinks == "argmax":
        with patched(model, config.backend):
            # one choice for both sides: the search itself is not differentiated
            sinks = find_sinks(model, join(harmful, refusal))[:, None]
    truth, eager_value = _eager_gradients(model, config, harmful, refusal, sinks, None)
    ours, value = _our_gradients(model, config, harmful, refusal, sinks, autocast)
    floor = 0.0
    if autocast is not None:
        low, _ = _eager_gradients(model, config, harmful, refusal, sinks, autocast)
        floor = worst_gradient(low, truth)[0]
        tolerance = 2 * floor
    error, name = worst_gradient(ours, truth)
    return Verification(value, eager_value, error, name, floor, tolerance)


def eager_penalty(model, batch, n_harmful, sinks, rows, lambda_sink):
    """The penalty from attention maps [B, H, T, T], for any sinks and rows. The model must be on eager attention."""
    bounds, positions, n_sinks, weight = prepare(batch, sinks, rows)
    offset = torch.arange(batch.mask.shape[1], device=bounds.device) - bounds[:, :1]
    if positions is None:
        is_sink = (offset >= 0) & (offset < n_sinks)
    else:
        is_sink = (offset[:, :, None] == positions[:, None, :]).any(-1)
    keywords = {}
    if (bounds[:, 0] > 0).any():
        keywords["position_ids"] = (batch.mask.long().cumsum(1) - 1).clamp_min(0)
    maps = model(
        input_ids=batch.input_ids,
        attention_mask=batch.mask,
        use_cache=False,
        logits_to_keep=1,
        output_attentions=True,
        **keywords,
    ).attentions
    d = []
    for attention in maps:
        mass = torch.einsum("bhij,bj->bhi", attention.float(), is_sink.float())
        d.append(head_divergence(sequence_means(mass, weight), n_harmful))
    return lambda_sink * torch.stack(d).clamp_min(0).mean()


def _eager_gradients(model, config, harmful, refusal, sinks, autocast):
    was_training = model.training
    # eval mode switches checkpointing off: maps of a reentrant checkpoint carry no gradient
    model.eval()
    with eager_attention(model), _autocast(model, autocast):
        penalty = eager_penalty(
            model, join(harmful, refusal), harmful.mask.shape[0], sinks, config.rows, config.lambda_sink
        )
    model.train(was_training)
    return take_gradients(model, penalty), penalty.item()


def _our_gradients(model, config, harmful, refusal, sinks, autocast):
    config = copy.copy(config)
    with patched(model, config.backend):
        regularizer = SurgeryRegularizer(model, config)
        regularizer.fix_sinks(sinks)
        with _autocast(model, autocast):
            penalty = regularizer(harmful, refusal)
        return take_gradients(model, penalty), penalty.item()


def _autocast(model, dtype):
    device = next(unwrap(model).parameters()).device.type
    return torch.autocast(device, dtype=dtype, enabled=dtype is not None)


def take_gradients(model, penalty):
    """Gradients of `penalty` by parameter name; the parameters' own .grad is left as it was."""
    named = [(name, p) for name, p in unwrap(model).named_parameters() if p.requires_grad]
    kept = [p.grad for _, p in named]
    for _, p in named:
        p.grad = None
    penalty.backward()
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named}
    for (_, p), grad in zip(named, kept, strict=True):
        p.grad = grad
    return found


def worst_gradient(gradients, truth):
    """(largest relative error, its parameter); parameters without a true gradient must have none."""
    scale = max(x.norm() for x in truth.values())
    worst, name = 0.0, ""
    for key, expected in truth.items():
        # below rounding of the largest gradient there is nothing to compare
        error = float(
            (gradients[key].float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-6 * scale)
        )
        if error > worst or not name:
            worst, name = error, key
    return worst, name
