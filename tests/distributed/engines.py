"""A tiny model in each engine: wrapping, a step of task micro-batches, whole gradients."""

import os
from contextlib import nullcontext

import torch
from tiny import tiny_model
from torch import nn

MICRO_BATCHES = 2
CHECKPOINTING = ("off", "non-reentrant", "reentrant")


def set_checkpointing(model, checkpointing):
    if checkpointing != "off":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    if checkpointing == "reentrant":
        model.enable_input_require_grads()


def with_lora(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(7)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


def build(lora=False, checkpointing="off", **overrides):
    """The same tiny model on every rank."""
    model = tiny_model(attention="sdpa", **overrides)
    model = with_lora(model) if lora else model
    set_checkpointing(model, checkpointing)
    return model


class Plain:
    """No engine; also the base of the others.

    Attributes:
        model: what a training loop calls.
    """

    def __init__(self, model):
        self.model = self.wrap(model)

    def wrap(self, model):
        return model

    def micro_step(self, ids, last, weight=1.0):
        """Forward and backward of one of MICRO_BATCHES, its loss times `weight`."""
        with self.accumulating(last):
            (self.model(ids, labels=ids, use_cache=False).loss * weight / MICRO_BATCHES).backward()

    def accumulating(self, last):
        return nullcontext()

    def gradients(self):
        """Parameter name -> whole fp32 gradient."""
        named = self.inner().named_parameters()
        return {_plain(name): self.whole(p).float().clone() for name, p in named if p.requires_grad}

    def whole(self, p):
        if p.grad is None:
            return torch.zeros_like(p)
        return p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad

    def inner(self):
        return self.model

    def end_step(self):
        self.model.zero_grad()


class Ddp(Plain):
    def wrap(self, model):
        return nn.parallel.DistributedDataParallel(model)

    def inner(self):
        return self.model.module

    def accumulating(self, last):
        return nullcontext() if last else self.model.no_sync()


class Fsdp2(Plain):
    policy = None

    def wrap(self, model):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        from surgery.probe import unwrap

        options = {"mesh": init_device_mesh("cpu", (torch.distributed.get_world_size(),))}
        if self.policy is not None:
            options["mp_policy"] = self.policy
        for layer in unwrap(model).model.layers:
            fully_shard(layer, **options)
        return fully_shard(model, **options)

    def micro_step(self, ids, last, weight=1.0):
        self.model.set_requires_gradient_sync(last)
        super().micro_step(ids, last, weight)


class Fsdp2Bf16(Fsdp2):
    @property
    def policy(self):
        from torch.distributed.fsdp import MixedPrecisionPolicy

        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


class Zero2(Plain):
    stage = 2
    learning_rate = 0.0

    def wrap(self, model):
        import logging

        import deepspeed

        logging.disable(logging.WARNING)
        ranks = torch.distributed.get_world_size()
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "train_batch_size": MICRO_BATCHES * ranks,
            "zero_optimization": {"stage": self.stage, "stage3_param_persistence_threshold": 0, "overlap_comm": False},
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
        }
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=self.learning_rate)
        return deepspeed.initialize(model=model, config=config, optimizer=optimizer)[0]

    def micro_step(self, ids, last, weight=1.0):
        self.model.set_gradient_accumulation_boundary(last)
        # the engine divides by the accumulation steps
        self.model.backward(self.model(ids, labels=ids, use_cache=False).loss * weight)

    def whole(self, p):
        from deepspeed.utils import safe_get_full_grad

        found = safe_get_full_grad(p)
        return torch.zeros(p.ds_shape if hasattr(p, "ds_shape") else p.shape) if found is None else found

    def inner(self):
        return self.model.module

    def end_step(self):
        self.model.step()


class Zero3(Zero2):
    stage = 3


class TensorParallel(Plain):
    def wrap(self, model):
        return model

    @staticmethod
    def build(folder, lora, checkpointing):
        from transformers import AutoModelForCausalLM

        # once: the other rank may still be reading it
        if torch.distributed.get_rank() == 0 and not os.path.exists(folder):
            tiny_model(attention="sdpa", vocab_size=98).save_pretrained(folder)
        torch.distributed.barrier()
        model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32).train()
        model = with_lora(model) if lora else model
        set_checkpointing(model, checkpointing)
        return model


ENGINES = {
    "plain": Plain,
    "ddp": Ddp,
    "fsdp2": Fsdp2,
    "fsdp2-bf16": Fsdp2Bf16,
    "zero2": Zero2,
    "zero3": Zero3,
    "tp": TensorParallel,
}


def _plain(name):
    return name.replace("_orig_mod.", "")
