"""`verify` for a model inside an engine: DDP, FSDP2, DeepSpeed ZeRO, tensor parallel."""

import copy

import torch
import torch.distributed as dist

from .paper_way import eager_attention
from .parallel import compute_device, data_parallel_ranks, run_backward, whole_gradient, whole_weight, world_size
from .patch import patched
from .probe import unwrap
from .regularizer import SurgeryRegularizer
from .rows import as_probe_batch, join
from .statistics import find_sinks
from .verify import Verification, eager_penalty, take_gradients, worst_gradient

ENGINES = ("ddp", "fsdp2", "zero2", "zero3")


def verify_injected(model, reference, config, harmful, refusal, tolerance=1e-4):
    """Compare the gradients that reach the optimizer in the user's own wrapped setup with eager autograd.

    Every rank calls it with its own pairs. The first rank runs all ranks' pairs through `reference` with
    `output_attentions=True` and averages the gradients as the engine does, or takes all pairs as one batch with
    divergence="global". Gradients on `model` are cleared before; a DeepSpeed engine must not be trained
    afterwards, since its accumulation has begun.

    Args:
        model: the model as it is trained, float32, dropout off.
        reference: the same model without an engine, on the first rank; None on the others. It gets `model`'s
            weights, of which that rank holds a whole copy.
        config: SurgeryConfig.
        harmful, refusal: this rank's small batches.
        tolerance: largest relative gradient error of a parameter.
    Returns:
        Verification, the same on every rank.
    Raises:
        ValueError: no reference on the first rank, or one with other parameters.
    """
    first = world_size() == 1 or dist.get_rank() == 0
    base = unwrap(model)
    named = list(base.named_parameters())
    _copy_weights(named, reference if first else None, first)
    device = compute_device(model, base)
    harmful, refusal = (as_probe_batch(batch).to(device) for batch in (harmful, refusal))
    with patched(model, config.backend):
        sinks = config.sinks
        if sinks == "argmax":
            sinks = find_sinks(model, join(harmful, refusal))[:, None]
        for _, p in named:
            p.grad = None
        regularizer = SurgeryRegularizer(model, copy.copy(config))
        regularizer.fix_sinks(sinks)
        value = regularizer.backward(harmful, refusal, lambda loss: run_backward(model, loss, boundary=True))
    pairs = _gather((harmful, refusal, sinks))
    if data_parallel_ranks(base, None) == 1:
        # tensor parallel: all ranks hold the same pair
        pairs = pairs[:1]
    values = _gather(value.item())
    found = {}
    for name, p in named:
        whole = whole_gradient(p) if p.requires_grad else None
        if first and p.requires_grad:
            found[name] = torch.zeros(_shape(p)) if whole is None else whole.float().cpu()
    result = None
    if first:
        eager_value, truth = _eager(reference, config, pairs)
        error, worst = worst_gradient(found, truth)
        result = Verification(sum(values) / len(values), eager_value, error, worst, 0.0, tolerance)
    return _gather(result)[0]


def wrap_in_engine(model, engine):
    """`model` as a small training script would wrap it: one of ENGINES, in the running process group.

    Raises:
        ValueError: unknown engine.
    """
    if engine == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    if engine == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(next(model.parameters()).device.type, (world_size(),))
        for layer in unwrap(model).model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    if engine in ("zero2", "zero3"):
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": int(engine[-1])},
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
        }
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        return deepspeed.initialize(model=model, config=config, optimizer=optimizer)[0]
    raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")


def _copy_weights(named, reference, first):
    """Parameter after parameter, so that no rank holds more than `reference` and one whole parameter."""
    weights = {} if reference is None else dict(unwrap(reference).named_parameters())
    if first and sorted(weights) != sorted(name for name, _ in named):
        raise ValueError("the first rank needs a reference with the model's own parameter names")
    for name, p in named:
        whole = whole_weight(p)
        if first:
            weights[name].data.copy_(whole)


def _shape(p):
    return p.ds_shape if hasattr(p, "ds_shape") else p.shape


def _gather(value):
    """`value` of every rank, a list."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def _eager(reference, config, pairs):
    """(penalty, gradients on the CPU) of all ranks' pairs on the reference."""
    device = next(reference.parameters()).device
    pairs = [tuple(x.to(device) if hasattr(x, "to") else x for x in pair) for pair in pairs]
    if config.divergence == "global":
        pairs = [_as_one(pairs)]
    total, value = None, 0.0
    was_training = reference.training
    # eval mode switches checkpointing off: maps of a reentrant checkpoint carry no gradient
    reference.eval()
    for harmful, refusal, sinks in pairs:
        with eager_attention(reference):
            batch, count = join(harmful, refusal), len(harmful.mask)
            penalty = eager_penalty(reference, batch, count, sinks, config.rows, config.lambda_sink)
        gradients = take_gradients(reference, penalty)
        value += penalty.item() / len(pairs)
        share = {name: g.float().cpu() / len(pairs) for name, g in gradients.items()}
        total = share if total is None else {name: total[name] + g for name, g in share.items()}
    reference.train(was_training)
    return value, total


def _as_one(pairs):
    """All ranks' (harmful, refusal, sinks) as one."""
    sides = []
    for side in (0, 1):
        joined = pairs[0][side]
        for pair in pairs[1:]:
            joined = join(joined, pair[side])
        sides.append(joined)
    sinks = pairs[0][2]
    if isinstance(sinks, torch.Tensor):
        counts = [len(pair[0].mask) for pair in pairs]
        sinks = torch.cat(
            [pair[2][:n] for pair, n in zip(pairs, counts, strict=True)]
            + [pair[2][n:] for pair, n in zip(pairs, counts, strict=True)]
        )
    return sides[0], sides[1], sinks
