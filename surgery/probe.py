"""What travels through the model as the keyword `surgery_ctx`, and the relay that ties it to the loss.

A `Probe` is deliberately an opaque object: not a tuple, dict or dataclass of tensors, and without `.to`. Wrappers
(FSDP2's input casting, accelerate's device placement, pytree maps) would copy or cast tensors they can see.
"""

import torch
import torch.nn as nn

from .parallel import deepspeed_engine, is_a
from .penalty_op import penalty_attn, sequence_means

INF = float("inf")


class Probe:
    """One probe forward: what to record, and where it goes.

    Attributes:
        kind: "penalty" (values, and the regulariser's gradient in the backward), "mass" (values only) or "columns"
            (total attention each key receives, for finding the sink).
        recorded: fp32, NaN until written, inf where a NaN was: [L, B, H] alpha (this rank's heads), or [L, B, T]
            summed over heads for "columns".
        bounds: int32 [B, 2], see `masks.padding_bounds`.
        row_weight: [B, T] fp32.
        sinks: int32 [B, n] positions from each sequence's first real token, or None for the first n_sinks.
        share: [B] fp32, and positive: [L, H] fp32 (this rank's heads) or None; for "penalty", see penalty_op.py.
        control: [1 + L] fp32, see penalty_op.py.
        split: context_parallel.Split when the sequences are split over ranks, else None.
    """

    def __init__(self, kind, recorded, bounds, row_weight, sinks, n_sinks, n_harmful=0, share=None, positive=None):
        self.kind = kind
        self.recorded = recorded
        self.bounds = bounds
        self.row_weight = row_weight
        self.sinks = sinks
        self.n_sinks = n_sinks
        self.n_harmful = n_harmful
        self.share = share
        self.positive = positive
        self.split = None
        self.control = torch.zeros(1 + recorded.shape[0], device=recorded.device)

    def record(self, layer, rows_or_columns):
        """Copy a layer's values out: [B, H, T] sink mass, or [B, H, T] column mass. No gradient passes."""
        with torch.no_grad():
            if self.kind == "columns":
                values = rows_or_columns.sum(1)
            else:
                values = sequence_means(rows_or_columns.detach().float(), self.row_weight)
            self.store(layer, values)

    def store(self, layer, values):
        """Copy a layer's [B, H] means, or [B, T] columns, out."""
        with torch.no_grad():
            # a NaN would pass for a layer that wrote nothing
            self.recorded[layer].copy_(values.nan_to_num(nan=INF, posinf=INF, neginf=INF))


def penalty_attention(probe, layer, q, k, v, inputs, backend):
    """`penalty_attn` with the numbers of AttnInputs `inputs`; returns out [B, T, H, D] and sink mass [B, H, T]."""
    out, _, sink_mass = penalty_attn(
        q,
        k,
        v,
        probe.bounds,
        probe.sinks,
        probe.row_weight,
        probe.share,
        probe.positive,
        probe.control,
        layer,
        probe.n_harmful,
        probe.n_sinks,
        inputs.softmax_scale,
        inputs.causal,
        *inputs.window_size,
        inputs.softcap,
        backend,
    )
    return out, sink_mass


class Relay(torch.autograd.Function):
    """Stands between the model's logits and the loss, always in eager mode.

    Forward: the penalty's value. Backward: hands the upstream gradient (loss scale, accumulation, GradScaler) times
    the coefficient to the layers, and sends zeros down the logits, so that the hooks of every wrapper fire and all
    parameters get a gradient.
    """

    @staticmethod
    def forward(ctx, logits, value, coefficient, probe, on_backward_end):
        ctx.shape, ctx.dtype, ctx.device = logits.shape, logits.dtype, logits.device
        ctx.coefficient, ctx.probe, ctx.on_backward_end = coefficient, probe, on_backward_end
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        # .data: compiled layers hold `control` as a saved tensor, whose version must not change
        ctx.probe.control.data[0] = gradient * ctx.coefficient
        # runs when the whole backward is done, also when checkpointing nests backwards inside it
        torch.autograd.Variable._execution_engine.queue_callback(ctx.on_backward_end)
        return torch.zeros(ctx.shape, dtype=ctx.dtype, device=ctx.device), None, None, None, None


def unwrap(model):
    """The Hugging Face model inside DDP, DeepSpeed, torch.compile and PEFT wrappers.

    Raises:
        ValueError: nn.DataParallel, which replicates the model in threads and would lose the statistics; FSDP1.
    """
    while True:
        if isinstance(model, nn.DataParallel):
            raise ValueError(
                "nn.DataParallel is not supported: its replicas lose the statistics. Start one process a GPU "
                "(torchrun or accelerate launch), or show one GPU only (CUDA_VISIBLE_DEVICES=0)"
            )
        if is_a(model, "FullyShardedDataParallel"):
            raise ValueError(
                "FSDP1 (FullyShardedDataParallel) is not supported: use FSDP2, torch.distributed.fsdp.fully_shard, or "
                "fsdp_version 2 with accelerate and Trainer"
            )
        if isinstance(model, nn.parallel.DistributedDataParallel) or deepspeed_engine(model) is not None:
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model
