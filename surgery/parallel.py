"""What a regulariser must know of the engine around a model: ranks that agree, whose heads, how a backward is run."""

from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def world_size(group=None):
    """Processes of `group` (default: all); 1 outside a process group."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def any_rank(flag, device):
    """Whether `flag` is true on any rank, the same answer on all of them. Without a process group it is `flag`."""
    if world_size() == 1:
        return bool(flag)
    highest = torch.tensor(int(flag), device=device)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    return bool(highest)


def common_value(value, device):
    """`value` (an int >= 0) if all ranks hold the same, else None on all of them; None stands for no value."""
    if world_size() == 1:
        return value
    own = -1 if value is None else value
    # one reduction gives both ends: the largest, and the smallest as the largest of the negated
    ends = torch.tensor([own, -own], device=device)
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    highest, lowest = ends[0].item(), -ends[1].item()
    return highest if highest == lowest and highest >= 0 else None


def is_a(model, class_name):
    """isinstance by the class's name, for libraries that are not imported."""
    return any(cls.__name__ == class_name for cls in type(model).__mro__)


def deepspeed_engine(model):
    """`model` if it is a DeepSpeed engine, else None."""
    return model if is_a(model, "DeepSpeedEngine") else None


def tensor_parallel_group(base):
    """The process group over which transformers split the heads of `base`, or None."""
    if (getattr(base, "_tp_size", None) or 1) == 1:
        return None
    mesh = base._device_mesh
    return (mesh["tp"] if mesh.ndim > 1 else mesh).get_group()


def check_adapters(base):
    """Refuse adapters on split layers.

    Raises:
        ValueError: tensor parallel with PEFT adapters.
    """
    if tensor_parallel_group(base) is None:
        return
    if any(is_a(m, "BaseTunerLayer") for m in base.modules()):
        raise ValueError(
            "adapters with tensor parallel: what PEFT makes of layers that transformers has split differs between "
            "their releases, and none was exact here. Use DDP, FSDP2 or DeepSpeed for adapters"
        )


def all_heads(base, local):
    """[L, B, H] of all heads out of a tensor-parallel rank's [L, B, H / ranks]; otherwise `local` itself."""
    group = tensor_parallel_group(base)
    if group is None:
        return local
    parts = [torch.empty_like(local) for _ in range(world_size(group))]
    dist.all_gather(parts, local.contiguous(), group)
    return torch.cat(parts, -1)


def sum_of_heads(base, local):
    """Sum over tensor-parallel ranks of what each summed over its own heads; otherwise `local` itself."""
    group = tensor_parallel_group(base)
    if group is not None:
        dist.all_reduce(local, group=group)
    return local


def local_heads(base, values):
    """This tensor-parallel rank's part of [L, H] `values`: `all_heads` the other way round."""
    group = tensor_parallel_group(base)
    return values if group is None else values.chunk(world_size(group), -1)[dist.get_rank(group)].contiguous()


def data_parallel_ranks(base, group):
    """Ranks over which an engine averages gradients.

    Args:
        base: the unwrapped model.
        group: the data-parallel process group, or None: every rank is, but for one tensor-parallel group.
    Raises:
        ValueError: tensor and data parallel at once, and no group to tell them apart.
    """
    if group is not None:
        return world_size(group)
    tensor_parallel = tensor_parallel_group(base)
    if tensor_parallel is None:
        return world_size()
    if world_size(tensor_parallel) != world_size():
        raise ValueError(
            f"the model is tensor parallel over {world_size(tensor_parallel)} of {world_size()} ranks: pass the "
            f"data-parallel process group to SurgeryRegularizer as group="
        )
    return 1


def compute_device(model, base):
    """Where `model` computes: with offloaded parameters that is not where they lie."""
    engine = deepspeed_engine(model)
    if engine is not None:
        return torch.device(engine.device)
    parameter = next(base.parameters())
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is not None and mesh.device_type != parameter.device.type:
        return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())
    return parameter.device


def without_sync(model, last):
    """Context of one of several forwards and backwards: DDP reduces gradients in the last one only.

    FSDP2 and DeepSpeed reduce in each: keeping unreduced gradients would cost the memory they save.
    """
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


def run_backward(model, loss, boundary=False):
    """loss.backward() by the engine's rules, and never an optimizer step.

    DeepSpeed divides by its accumulation steps and takes a boundary backward for the step's last one; both would be
    wrong for a loss that comes once a step and before the task's.

    Args:
        model: as it is trained.
        loss: scalar.
        boundary: take it for the step's last backward after all, so that ZeRO's gradients can be read.
    """
    engine = deepspeed_engine(model)
    if engine is None:
        loss.backward()
        return
    # None: the engine counts micro-steps itself
    before = engine._is_gradient_accumulation_boundary
    engine.set_gradient_accumulation_boundary(boundary)
    try:
        engine.backward(loss, scale_wrt_gas=False)
    finally:
        engine.set_gradient_accumulation_boundary(before)


def whole_weight(p):
    """All of a parameter's value, whatever its engine keeps on this rank. Every rank calls it."""
    if hasattr(p, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([p]):
            return p.detach().clone()
    p = p.detach()
    return p.full_tensor() if hasattr(p, "full_tensor") else p


def whole_gradient(p):
    """All of a parameter's gradient, or None; with ZeRO-2 only after a boundary backward. Every rank calls it."""
    if hasattr(p, "ds_id") or hasattr(p, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(p)
    return p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
