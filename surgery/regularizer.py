"""SurgeryRegularizer: the loss term, exact under checkpointing, accumulation, loss scaling, compile and sharding.

penalty = lambda / |H| * sum_h relu(d_h), d_h = alpha_h(harmful) - alpha_h(refusal)   (paper, eq. 4)

Where one forward sees all sequences of d, each layer finds the sign of d by itself. Otherwise (chunks, a batch spread
over ranks) a first pass without gradient measures d, and the second one is given [d > 0] of every head.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .config import SurgeryConfig
from .parallel import (
    all_heads,
    any_rank,
    check_adapters,
    common_value,
    compute_device,
    data_parallel_ranks,
    deepspeed_engine,
    local_heads,
    run_backward,
    without_sync,
)
from .patch import attention_modules, check_patched
from .probe import Relay
from .rows import ProbeBatch, as_probe_batch, join, shares
from .statistics import NonFiniteStatistic, check_finite, find_sinks, mass_probe, run_probe


class PenaltyReport(NamedTuple):
    """What the last call measured, detached, on the model's device.

    Attributes:
        penalty: scalar, lambda included. With divergence="global" this and the rest are of all ranks' pairs.
        divergence: [L, H] d.
        harmful, refusal: [L, H] alpha of both sides.
        sink_position: the position used by all sequences, or -1 when they differ.
        dropped: the activations were not finite and nonfinite="drop": no gradient, penalty 0, the rest NaN.
    """

    penalty: Tensor
    divergence: Tensor
    harmful: Tensor
    refusal: Tensor
    sink_position: int
    dropped: bool = False

    @property
    def positive_heads(self):
        return int((self.divergence > 0).sum())


class _Pair(NamedTuple):
    """One call's input on the model's device: [harmful; refusal] rows, the first `n_harmful` of them harmful."""

    base: torch.nn.Module
    batch: ProbeBatch
    n_harmful: int
    sinks: int | tuple | Tensor
    chunks: list

    def chunk(self, rows):
        """(batch, sinks) of a slice of rows."""
        batch = ProbeBatch(*(None if x is None else x[rows] for x in self.batch))
        return batch, self.sinks[rows] if isinstance(self.sinks, Tensor) else self.sinks


class SurgeryRegularizer:
    """lambda / |H| * sum_h relu(alpha_h(harmful) - alpha_h(refusal)) as a scalar with exact gradients.

        model = surgery.patch_model(model)
        reg = surgery.SurgeryRegularizer(model, surgery.SurgeryConfig())
        reg(harmful_batch, refusal_batch).backward()     # once an optimizer step, before the task's own backward
        task_loss.backward(); optimizer.step()

    `reg.backward(harmful_batch, refusal_batch)` does the same and is the way with DeepSpeed and with chunks.

    Its own backward before the task's forward ("split") is what costs no extra memory. Each call is one forward of
    [harmful; refusal] rows; a head's divergence is computed in its layer and its gradient enters in the layer's
    attention backward, scaled by whatever scales this loss.

    In a process group every rank calls it at the same point with its own pairs.

    Args:
        model: a patched causal language model, or its DDP / FSDP2 / DeepSpeed / PEFT / compiled wrapper.
        config: SurgeryConfig; default the paper's.
        group: the data-parallel process group; default: all ranks, but for one tensor-parallel group.
    Raises:
        ValueError: the model is not patched, of an unknown family, wrapped in nn.DataParallel or FSDP1, or tensor
            parallel with adapters.
    """

    def __init__(self, model, config=None, group=None):
        self.model = model
        self.config = SurgeryConfig() if config is None else config
        self.group = group
        check_adapters(check_patched(model))
        self.report = None
        self._waiting = None
        self._sink_position = None
        self._fixed_sinks = None
        self._totals = None
        self._calls = self._dropped = 0

    @property
    def dropped(self):
        """Probes left out so far because their activations were not finite."""
        return self._dropped

    def __call__(self, harmful, refusal):
        """The penalty of one pair of batches.

        Args:
            harmful, refusal: what a tokenizer returns: input_ids [B, T], attention_mask [B, T], and row_mask [B, T]
                when config.rows is "response". Lengths and numbers of sequences may differ.
        Returns:
            Scalar fp32, lambda included. `self.report` holds the per-head values.
        Raises:
            ValueError: bad batches; the model's attention is not ours any more; DeepSpeed or several chunks, which
                need `backward`.
            RuntimeError: a layer wrote no statistic; the previous call's loss never went backward; in the backward:
                the gradient did not arrive in every layer.
            NonFiniteStatistic: NaN activations and nonfinite="raise".
        """
        pair = self._start(harmful, refusal)
        if not torch.is_grad_enabled():
            self._measure(pair)
            return self.report.penalty
        if deepspeed_engine(self.model) is not None:
            raise ValueError("DeepSpeed scales and steps in its own backward: call regularizer.backward(...) instead")
        if len(pair.chunks) > 1:
            raise ValueError(
                f"{len(pair.batch.mask)} probe sequences in chunks of {self.config.probe_chunk_size} need a backward "
                f"for each chunk: call regularizer.backward(...) instead"
            )
        positive = self._measure(pair) if self._measures_first else None
        if positive is not None and self.report.dropped:
            return self.report.penalty.clone().requires_grad_()
        return self._loss(pair, slice(None), positive)

    def backward(self, harmful, refusal, backward=None, context=nullcontext):
        """Forward and backward of the penalty, chunk after chunk, by the rules of the engine around the model.

        Args:
            harmful, refusal: as in a call.
            backward: called with each chunk's loss, `accelerator.backward` say; default: `loss.backward()`, or
                DeepSpeed's backward off the accumulation boundary and without its division by accumulation steps.
            context: called for a context manager around each forward, `lambda: torch.autocast("cuda")` say.
        Returns:
            The penalty, detached. `self.report` holds the per-head values.
        Raises:
            as a call; RuntimeError: gradients are switched off.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError("backward() under torch.no_grad() would leave no gradient: call the regulariser instead")
        states, positive = [], None
        with context():
            pair = self._start(harmful, refusal)
            if len(pair.chunks) > 1 or self._measures_first:
                positive = self._measure(pair, states)
        if positive is not None and self.report.dropped:
            return self.report.penalty
        for number, rows in enumerate(pair.chunks):
            if states:
                _set_random_state(states[number])
            with without_sync(self.model, last=number == len(pair.chunks) - 1):
                with context():
                    loss = self._loss(pair, rows, positive)
                if backward is None:
                    run_backward(self.model, loss)
                else:
                    backward(loss)
        return self.report.penalty

    def state_dict(self):
        """What a resumed run needs to go on identically: JSON types."""
        return {"calls": self._calls, "sink_position": self._sink_position, "dropped": self._dropped}

    def load_state_dict(self, state):
        """Restore `state_dict`."""
        self._calls, self._sink_position = state["calls"], state["sink_position"]
        self._dropped = state.get("dropped", 0)

    def fix_sinks(self, sinks):
        """Use these sinks in every call: int, positions, or int tensor [B, n] for [harmful; refusal] sequences."""
        self._fixed_sinks = sinks

    @property
    def _measures_first(self):
        return self.config.divergence == "global" or self.config.nonfinite == "drop"

    def _start(self, harmful, refusal):
        base = check_patched(self.model)
        self._check_previous_backward()
        device = compute_device(self.model, base)
        harmful = as_probe_batch(harmful, "harmful batch").to(device)
        refusal = as_probe_batch(refusal, "refusal batch").to(device)
        batch = join(harmful, refusal)
        count = len(batch.mask)
        size = min(self.config.probe_chunk_size or count, count)
        chunks = [slice(first, min(first + size, count)) for first in range(0, count, size)]
        if self.config.probe_chunk_size is not None and common_value(len(chunks), device) is None:
            raise ValueError(f"every rank must have the same number of probe chunks, this one has {len(chunks)}")
        pair = _Pair(base, batch, len(harmful.mask), None, chunks)
        pair = pair._replace(sinks=self._sinks(pair))
        self._calls += 1
        return pair

    def _measure(self, pair, states=None):
        """Pass one: alpha of all chunks without gradient, and the report. Returns [d > 0] as fp32 [L, H].

        `states`, a list, receives the random state before each chunk. The state afterwards is that before: the
        second pass must draw the same dropout.
        """
        device = pair.batch.mask.device
        start, alpha = _random_state(device), []
        with torch.no_grad():
            for rows in pair.chunks:
                if states is not None:
                    states.append(_random_state(device))
                batch, sinks = pair.chunk(rows)
                share = torch.zeros(len(batch.mask), device=device)
                probe = mass_probe(pair.base, batch, sinks, self.config.rows, "penalty", share=share)
                run_probe(self.model, pair.base, batch, probe)
                alpha.append(probe.recorded)
        _set_random_state(start)
        return self._report(pair, all_heads(pair.base, torch.cat(alpha, 1)))

    def _loss(self, pair, rows, positive):
        """Forward with gradient of a slice of rows; a scalar whose backward injects their part of the gradient."""
        batch, sinks = pair.chunk(rows)
        count = len(pair.batch.mask)
        ranks, totals = 1, None
        if self.config.divergence == "global":
            # the engine averages over ranks what must be a sum
            ranks, totals = data_parallel_ranks(pair.base, self.group), self._totals
        share = ranks * shares(count, pair.n_harmful, totals)[rows].to(batch.mask.device)
        given = None if positive is None else local_heads(pair.base, positive)
        probe = mass_probe(pair.base, batch, sinks, self.config.rows, "penalty", pair.n_harmful, share, given)
        logits = run_probe(self.model, pair.base, batch, probe)
        if positive is None:
            self._report(pair, all_heads(pair.base, probe.recorded))
        else:
            # dropout that is drawn anew, or NaN that came only now
            check_finite(probe.recorded)
        return self._relay(pair.base, logits, self.report.penalty / len(pair.chunks), probe)

    def _report(self, pair, alpha):
        """Set `self.report` from alpha [L, B, H], all heads; returns [d > 0]."""
        n = pair.n_harmful
        counts = alpha.new_tensor([n, len(pair.batch.mask) - n])
        sums = torch.stack((alpha[:, :n].sum(1), alpha[:, n:].sum(1)))
        if self.config.divergence == "global" and data_parallel_ranks(pair.base, self.group) > 1:
            both = torch.cat((counts, sums.flatten()))
            dist.all_reduce(both, group=self.group)
            counts, sums = both[:2], both[2:].view_as(sums)
        self._totals = [int(x) for x in counts]
        harmful, refusal = sums / counts[:, None, None]
        finite = bool(sums.isfinite().all())
        if self.config.nonfinite == "drop":
            finite = not any_rank(not finite, alpha.device)
        elif not finite:
            check_finite(alpha)
            raise NonFiniteStatistic("the model's activations on another rank's probe are NaN or infinite")
        if not finite:
            return self._drop(pair, harmful)
        divergence = harmful - refusal
        penalty = self._coefficient(divergence) * divergence.clamp_min(0).sum()
        self.report = PenaltyReport(penalty, divergence, harmful, refusal, _common(pair.sinks))
        return (divergence > 0).float()

    def _drop(self, pair, like):
        self._dropped += 1
        # a sink found in NaN attention is none
        self._sink_position = self._sink_before
        unknown = torch.full_like(like, float("nan"))
        zero = torch.zeros((), device=like.device)
        self.report = PenaltyReport(zero, unknown, unknown, unknown, _common(pair.sinks), dropped=True)
        return torch.zeros_like(like)

    def _coefficient(self, divergence):
        return self.config.lambda_sink / divergence.numel()

    def _relay(self, base, logits, value, probe):
        if not logits.requires_grad:
            raise RuntimeError(
                "the penalty has no path to a trainable parameter. Under reentrant checkpointing with frozen "
                "embeddings call model.enable_input_require_grads(); otherwise check requires_grad"
            )
        expected = _layers_with_gradient(base)
        if not expected:
            raise RuntimeError(
                "no trainable parameter comes before an attention layer, so the penalty cannot change anything"
            )
        self._waiting = probe

        def check():
            self._waiting = None
            arrived = probe.control[1:].tolist()
            missing = [layer for layer in expected if not arrived[layer]]
            if missing:
                raise RuntimeError(
                    f"the regulariser's gradient did not arrive in layers {missing}: something between the model "
                    f"and the loss cut the graph. Training would go on without the defence"
                )

        return Relay.apply(logits, value, self._coefficient(self.report.divergence), probe, check)

    def _check_previous_backward(self):
        if self._waiting is not None:
            self._waiting = None
            raise RuntimeError(
                "the loss of the previous call never went backward, so its gradient is lost. Call .backward() on it "
                "before the next call, or call under torch.no_grad() when only the value is wanted"
            )

    def _sinks(self, pair):
        """int, positions, or [B, 1] of one step, by config.sinks."""
        self._sink_before = known = self._sink_position
        if self._fixed_sinks is not None:
            return self._fixed_sinks
        if self.config.sinks != "argmax":
            return self.config.sinks
        batch = pair.batch
        # a sequence too short for the known position has its sink elsewhere
        search = known is None or self._calls % self.config.sink_refresh_steps == 0 or batch.mask.sum(1).min() <= known
        # the search is a forward, which sharded models run on all ranks or on none
        if not any_rank(search, batch.mask.device):
            return (known,)
        found = torch.cat([self._search(pair.chunk(rows)[0]) for rows in pair.chunks])
        # sequences that agree make the search superfluous until the next refresh
        agreed = int(found[0]) if bool((found == found[0]).all()) else None
        self._sink_position = common_value(agreed, batch.mask.device)
        return found[:, None]

    def _search(self, batch):
        try:
            return find_sinks(self.model, batch)
        except NonFiniteStatistic:
            if self.config.nonfinite == "raise":
                raise
            # the pass that measures drops this probe on all ranks
            return torch.zeros(len(batch.mask), dtype=torch.int32, device=batch.mask.device)


def _random_state(device):
    """State of the generators that dropout uses."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state):
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])


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
