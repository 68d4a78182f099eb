"""Context parallelism: one probe's sequences split over the ranks of a group, for texts too long for one device.

    from surgery.context_parallel import split_probes, sum_gradients

    with split_probes(model, group, style="ring"):        # every rank calls the same with the same whole batches
        mass = surgery.sink_mass(model, input_ids)         # the whole sequences' values, on every rank
        regularizer(harmful, refusal).backward()
    sum_gradients(model, group)                            # each rank holds its tokens' share

"ring" sends keys and values round (ring.py); "ulysses" exchanges sequence for heads, so that each rank has the whole
sequence of some heads. Only probes are split: the task's own forward is the engine's business.
"""

import copy
from contextlib import contextmanager

import surgery_kernels as sk
import torch
import torch.distributed as dist
from torch.nn.functional import pad

from .parallel import tensor_parallel_group
from .patch import SPLIT, check_patched
from .penalty_op import sequence_means
from .probe import penalty_attention, unwrap
from .ring import Ring, RingAttention, ring_columns, ring_forward

STYLES = ("ring", "ulysses")


@contextmanager
def split_probes(model, group=None, style="ring"):
    """Inside the with block the probes of `model` (sink_mass, find_sinks, SurgeryRegularizer) are split over `group`.

    Every rank of the group must make the same calls with the same batches and the same weights. Values are those of
    the whole sequences; after a backward each rank holds a share of the gradient, whose sum over the group is exact
    (`sum_gradients`; where DDP or FSDP averages over the group, multiply the penalty by the group's size instead).

    Args:
        model: a patched model, wrapped or not.
        group: torch.distributed process group; default all ranks.
        style: "ring" for any number of heads, "ulysses" for sliding windows and few ranks.
    Raises:
        ValueError: unknown style, not patched, no process group, already split; "ulysses" with heads that the group
            does not divide. Inside the block: "ring" with sliding windows or on the reference backend.
    """
    base = check_patched(model)
    if style not in STYLES:
        raise ValueError(f"style must be one of {', '.join(STYLES)}, got {style!r}")
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("no process group: start with torchrun and call torch.distributed.init_process_group first")
    if getattr(base, SPLIT, None) is not None:
        raise ValueError("the probes of this model are split already: leave the outer with block first")
    setattr(base, SPLIT, Split(base, dist.group.WORLD if group is None else group, style))
    try:
        yield model
    finally:
        delattr(base, SPLIT)


def sum_gradients(model, group=None):
    """Add up the gradients of `model`'s trainable parameters over `group`, in place: after the probe's backward."""
    for parameter in unwrap(model).parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=group)


class Split:
    """How probes are split: opaque, like `Probe`, which carries it to the attention function."""

    def __init__(self, base, group, style):
        self.group, self.style = group, style
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if tensor_parallel_group(base) is not None:
            raise ValueError("probes are split over a group or over tensor-parallel ranks, not both")
        config = base.config.get_text_config()
        heads = {name: getattr(config, name) for name in ("num_attention_heads", "num_key_value_heads")}
        if style == "ulysses" and any(count % self.size for count in heads.values()):
            raise ValueError(f"ulysses needs heads that {self.size} ranks divide, got {heads}: use style='ring'")

    def inputs(self, batch, probe):
        """This rank's part of a ProbeBatch as keywords of the model; pads `probe` to a multiple of the ranks.

        Raises:
            ValueError: the ranks of the group have different batches.
        """
        self._check_same(batch)
        short = -batch.mask.shape[1] % self.size
        mask = pad(batch.mask, (0, short))
        probe.row_weight = pad(probe.row_weight, (0, short))
        whole = {
            "input_ids": pad(batch.input_ids, (0, short)),
            "attention_mask": mask,
            "position_ids": (mask.long().cumsum(1) - 1).clamp_min(0),
        }
        return {name: x.chunk(self.size, 1)[self.rank].contiguous() for name, x in whole.items()}

    def _check_same(self, batch):
        ids = torch.where(batch.mask, batch.input_ids + 1, 0).flatten()
        place = torch.arange(1, ids.numel() + 1, device=ids.device)
        mine = torch.stack((torch.tensor(batch.mask.shape[1], device=ids.device), ids.sum(), (ids * place).sum()))
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine, group=self.group)
        if any(not torch.equal(mine, other) for other in found):
            raise ValueError("the ranks of a split probe must all be given the same batches, got different ones")

    # always eager: a compiler must not look at messages between ranks
    @torch.compiler.disable
    def attention(self, probe, module, q, k, v, options, backend):
        """Attention of one layer on this rank's rows [B, C, H, D]; records the layer. Returns [B, C, H, D]."""
        # cast once, as autocast would; the statistic and its gradient are fp32
        inputs = sk.make_inputs(q, k, v, **options, sinks=0, stats=())
        run = self._ring if self.style == "ring" else self._ulysses
        with torch.autocast(q.device.type, enabled=False):
            return run(probe, module.layer_idx, inputs.q, inputs.k, inputs.v, options, backend)

    def _ring(self, probe, layer, q, k, v, options, backend):
        if options["window_size"] != (-1, -1):
            raise ValueError(
                f"a ring does not know sliding windows (layer {layer} has {options['window_size']}): use "
                f"split_probes(style='ulysses')"
            )
        ring = Ring(
            self.group,
            self.rank,
            self.size,
            probe.bounds,
            options["softmax_scale"],
            options["causal"],
            options["softcap"],
            backend,
        )
        if probe.kind == "columns":
            out, lse = ring_forward(ring, q, k, v)
            self._store(probe, layer, self._gathered(ring_columns(ring, q, k, v, lse)))
            return out
        out, alpha = RingAttention.apply(q, k, v, probe, layer, ring)
        self._store(probe, layer, alpha)
        return out

    def _ulysses(self, probe, layer, q, k, v, options, backend):
        q, k, v = (_Exchange.apply(x, 2, 1, self.group) for x in (q, k, v))
        if probe.positive is not None:
            probe = copy.copy(probe)
            probe.positive = probe.positive.chunk(self.size, 1)[self.rank].contiguous()
        sinks = probe.n_sinks if probe.sinks is None else probe.sinks
        first, end = (x.contiguous() for x in probe.bounds.unbind(1))
        lengths = {"leftpad_k": first, "seqused_q": end, "seqused_k": end}
        if probe.kind == "penalty":
            inputs = sk.make_inputs(q, k, v, **options, sinks=sinks, **lengths)
            out, mass = penalty_attention(probe, layer, q, k, v, inputs, sk.choose_backend(inputs, backend))
        else:
            stats = ("sink_mass",) if probe.kind == "mass" else ()
            result = sk.flash_attn_stats(q, k, v, **options, sinks=sinks, stats=stats, **lengths, backend=backend)
            out, mass = result.out, result.stats.get("sink_mass")
        if probe.kind == "columns":
            columns = sk.column_mass(sk.make_inputs(q, k, v, **options, sinks=0, **lengths), result.lse).sum(1)
            dist.all_reduce(columns, group=self.group)
            self._store(probe, layer, columns)
        else:
            self._store(probe, layer, self._gathered(sequence_means(mass.detach().float(), probe.row_weight)))
        return _Exchange.apply(out, 1, 2, self.group)

    def _gathered(self, part):
        """Every rank's [B, n] side by side."""
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part.contiguous(), group=self.group)
        return torch.cat(parts, 1)

    def _store(self, probe, layer, values):
        # columns of the padding up to a multiple of the ranks are left out
        probe.store(layer, values.detach()[:, : probe.recorded.shape[2]])


class _Exchange(torch.autograd.Function):
    """All-to-all: dimension `scatter` is split over the ranks, `gather` is made whole."""

    @staticmethod
    def forward(ctx, x, scatter, gather, group):
        ctx.dims, ctx.group = (gather, scatter), group
        return _exchange(x, scatter, gather, group)

    @staticmethod
    def backward(ctx, gradient):
        return _exchange(gradient, *ctx.dims, ctx.group), None, None, None


def _exchange(x, scatter, gather, group):
    sent = torch.stack(x.chunk(dist.get_world_size(group), scatter))
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return torch.cat(received.unbind(0), gather)
