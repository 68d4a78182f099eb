"""SurgeryRegularizer: the loss term, exact under checkpointing, accumulation, loss scaling and compile.

penalty = lambda / |H| * sum_h relu(d_h), d_h = alpha_h(harmful) - alpha_h(refusal)   (paper, eq. 4)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .config import SurgeryConfig
from .patch import attention_modules, check_patched
from .penalty_op import head_divergence
from .probe import Relay
from .rows import as_probe_batch, join
from .statistics import find_sinks, mass_probe, run_probe


class PenaltyReport(NamedTuple):
    """What the last call measured, detached, on the model's device.

    Attributes:
        penalty: scalar, lambda included.
        divergence: [L, H] d.
        harmful, refusal: [L, H] alpha of both sides.
        sink_position: the position used by all sequences, or -1 when they differ.
    """

    penalty: Tensor
    divergence: Tensor
    harmful: Tensor
    refusal: Tensor
    sink_position: int

    @property
    def positive_heads(self):
        return int((self.divergence > 0).sum())


class SurgeryRegularizer:
    """lambda / |H| * sum_h relu(alpha_h(harmful) - alpha_h(refusal)) as a scalar with exact gradients.

        model = surgery.patch_model(model)
        reg = surgery.SurgeryRegularizer(model, surgery.SurgeryConfig())
        reg(harmful_batch, refusal_batch).backward()     # once an optimizer step, before the task's own backward
        task_loss.backward(); optimizer.step()

    Its own backward before the task's forward ("split") is what costs no extra memory. Each call is one forward of
    [harmful; refusal] rows; a head's divergence is computed in its layer and its gradient enters in the layer's
    attention backward, scaled by whatever scales this loss.

    Args:
        model: a patched causal language model, or its DDP / FSDP2 / PEFT / compiled wrapper.
        config: SurgeryConfig; default the paper's.
    Raises:
        ValueError: the model is not patched, of an unknown family, or wrapped in nn.DataParallel.
    """

    def __init__(self, model, config=None):
        self.model = model
        self.config = SurgeryConfig() if config is None else config
        check_patched(model)
        self.report = None
        self._waiting = None
        self._sink_position = None
        self._fixed_sinks = None
        self._calls = 0

    def __call__(self, harmful, refusal):
        """The penalty of one pair of batches.

        Args:
            harmful, refusal: what a tokenizer returns: input_ids [B, T], attention_mask [B, T], and row_mask [B, T]
                when config.rows is "response". Lengths and numbers of sequences may differ.
        Returns:
            Scalar fp32, lambda included. `self.report` holds the per-head values.
        Raises:
            ValueError: bad batches; the model's attention is not ours any more.
            RuntimeError: a layer wrote no statistic; the previous call's loss never went backward; in the backward:
                the gradient did not arrive in every layer.
        """
        base = check_patched(self.model)
        self._check_previous_backward()
        device = next(base.parameters()).device
        harmful = as_probe_batch(harmful, "harmful batch").to(device)
        refusal = as_probe_batch(refusal, "refusal batch").to(device)
        n_harmful = harmful.mask.shape[0]
        batch = join(harmful, refusal)
        sinks = self._sinks(batch)
        probe = mass_probe(base, batch, sinks, self.config.rows, "penalty", n_harmful)
        logits = run_probe(self.model, base, batch, probe)
        alpha = probe.recorded
        divergence = torch.stack([head_divergence(layer, n_harmful) for layer in alpha])
        coefficient = self.config.lambda_sink / divergence.numel()
        penalty = coefficient * divergence.clamp_min(0).sum()
        self.report = PenaltyReport(
            penalty, divergence, alpha[:, :n_harmful].mean(1), alpha[:, n_harmful:].mean(1), _common(sinks)
        )
        self._calls += 1
        if not torch.is_grad_enabled():
            return penalty
        return self._relay(base, logits, penalty, coefficient, probe)

    def state_dict(self):
        """What a resumed run needs to go on identically: JSON types."""
        return {"calls": self._calls, "sink_position": self._sink_position}

    def load_state_dict(self, state):
        """Restore `state_dict`."""
        self._calls, self._sink_position = state["calls"], state["sink_position"]

    def fix_sinks(self, sinks):
        """Use these sinks in every call: int, positions, or int tensor [B, n] for [harmful; refusal] sequences."""
        self._fixed_sinks = sinks

    def _relay(self, base, logits, penalty, coefficient, probe):
        if not logits.requires_grad:
            raise RuntimeError(
                "the penalty has no path to a trainable parameter. Under reentrant checkpointing with frozen "
                "embeddings call model.enable_input_require_grads(); otherwise check requires_grad"
            )
        expected = _layers_with_gradient(base)
        self._waiting = probe

        def check():
            self._waiting = None
            # with no weight there is nothing to lose
            missing = [layer for layer in expected if probe.control[1 + layer] == 0]
            if missing:
                raise RuntimeError(
                    f"the regulariser's gradient did not arrive in layers {missing}: something between the model "
                    f"and the loss cut the graph. Training would go on without the defence"
                )

        return Relay.apply(logits, penalty, coefficient, probe, check)

    def _check_previous_backward(self):
        if self._waiting is not None:
            self._waiting = None
            raise RuntimeError(
                "the loss of the previous call never went backward, so its gradient is lost. Call .backward() on it "
                "before the next call, or call under torch.no_grad() when only the value is wanted"
            )

    def _sinks(self, batch):
        """int, positions, or [B, 1] of one step, by config.sinks."""
        if self._fixed_sinks is not None:
            return self._fixed_sinks
        if self.config.sinks != "argmax":
            return self.config.sinks
        if self._sink_position is not None and self._calls % self.config.sink_refresh_steps:
            return (self._sink_position,)
        found = find_sinks(self.model, batch)
        # sequences that agree make the search superfluous until the next refresh
        self._sink_position = int(found[0]) if bool((found == found[0]).all()) else None
        return found[:, None]


def _common(sinks):
    if isinstance(sinks, int):
        return 0
    if isinstance(sinks, tuple):
        return sinks[0]
    return int(sinks[0, 0]) if bool((sinks == sinks[0, 0]).all()) else -1


def _layers_with_gradient(base):
    """The layers whose attention inputs depend on a trainable parameter, so that a gradient must arrive there.

    Parameters come in the order of the forward; a layer needs one in its own projections or anywhere before.
    """
    modules = attention_modules(base)
    own = [{id(p) for p in module.parameters() if p.requires_grad} for module in modules]
    in_layer = {id(p): index for index, module in enumerate(modules) for p in module.parameters()}
    first = None
    layer_of_last = -1
    for parameter in base.parameters():
        layer_of_last = max(layer_of_last, in_layer.get(id(parameter), -1))
        if parameter.requires_grad and first is None:
            first = layer_of_last
    if first is None:
        return []
    if first < 0:
        return list(range(len(modules)))
    needs_input = any(_is_query_key_value(n) for n, p in modules[first].named_parameters() if id(p) in own[first])
    return list(range(first if needs_input else first + 1, len(modules)))


def _is_query_key_value(name):
    return not name.startswith("o_proj")
