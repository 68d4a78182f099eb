"""Lisa (Huang et al. 2024, arXiv 2405.18641): fine-tuning in two states that a proximal term holds together.

    alignment state    min_w  loss(refusals) + rho / 2 |w - w_switch|^2        lisa_alignment_steps optimizer steps
    task state         min_w  loss(task)     + rho / 2 |w - w_switch|^2        lisa_task_steps optimizer steps

w_switch is the other state's last iterate: the weights at the start of the current state. The released code leaves
the proximal term out during the first tenth of the steps, which the paper's formulas do not, nor do we; and it counts
micro-batches where we count optimizer steps.
"""

import math
import random
from pathlib import Path

import torch

from ..data import read_rows, rows_hash, task_examples
from .defence import Defence

SWITCH = "lisa_switch.safetensors"


class LisaMixin:
    """Lisa on a Trainer class; every other argument goes to that class.

    The state is a function of the optimizer step alone, and the alignment rows of run_seed and the micro-batch's
    number, in shuffled passes; data-parallel ranks take different ones. While aligning the task batch that Trainer
    drew is dropped, as in the released code.

    Args:
        alignment: see `data.task_examples`.
        alignment_steps, task_steps: optimizer steps of the two states, >= 1.
        rho: weight of the proximal term, >= 0.
    Raises:
        ValueError: the engine keeps parts of the weights or scales gradients.
    """

    def __init__(self, *args, alignment, alignment_steps, task_steps, rho, **kwargs):
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("lisa needs whole weights on every rank: no FSDP, no DeepSpeed")
        if getattr(self.accelerator, "scaler", None) is not None:
            raise ValueError("lisa adds to unscaled gradients: no fp16, use bf16")
        self.alignment, self.alignment_steps, self.task_steps, self.rho = alignment, alignment_steps, task_steps, rho
        # name -> weight at the start of the current state
        self._switch = None
        self._step = self._micro_batch = None
        self._resume_from = None

    def train(self, resume_from_checkpoint=None, **kwargs):
        self._switch = self._step = None
        self._resume_from = resume_from_checkpoint if isinstance(resume_from_checkpoint, str) else None
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.state.global_step != self._step:
            self._begin_step(self.state.global_step)
        else:
            self._micro_batch += 1
        if self._aligning(self._step):
            inputs, num_items_in_batch = self._alignment_batch(), None
        loss = super().training_step(model, inputs, num_items_in_batch)
        return loss + self._add_proximal(1 / self.current_gradient_accumulation_steps).to(loss.device)

    def _save_checkpoint(self, *args, **kwargs):
        super()._save_checkpoint(*args, **kwargs)
        if self.args.should_save:
            from safetensors.torch import save_file

            # before the checkpoint is marked as complete, see run_files.complete_checkpoints
            save_file(self._switch, Path(self.args.output_dir, f"checkpoint-{self.state.global_step}", SWITCH))

    def _aligning(self, step):
        return step % (self.alignment_steps + self.task_steps) < self.alignment_steps

    def _begin_step(self, step):
        check_steps(self.state.max_steps, self.alignment_steps)
        if step % (self.alignment_steps + self.task_steps) in (0, self.alignment_steps):
            self._switch = {
                name: p.detach().clone(memory_format=torch.contiguous_format) for name, p in self._trained()
            }
        elif self._switch is None:
            self._switch = self._load_switch(step)
        self._step, self._micro_batch = step, 0

    def _trained(self):
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def _load_switch(self, step):
        from safetensors.torch import load_file

        folder = self._resume_from or Path(self.args.output_dir, f"checkpoint-{step}")
        path = Path(folder, SWITCH)
        if not path.is_file():
            raise ValueError(f"the run resumes at step {step} inside a state of lisa, but {path} is missing")
        saved, trained = load_file(path), dict(self._trained())
        if saved.keys() != trained.keys():
            raise ValueError(f"{path} belongs to another model: {sorted(saved.keys() ^ trained.keys())[:4]} differ")
        return {name: w.to(self.args.device) for name, w in saved.items()}

    def _alignment_batch(self):
        size, count = len(self.alignment), self.args.train_batch_size
        number = self._step * self.args.gradient_accumulation_steps + self._micro_batch
        start = (number * self.args.world_size + self.args.process_index) * count
        rows = [self._order((start + i) // size)[(start + i) % size] for i in range(count)]
        return self.data_collator([self.alignment[row] for row in rows])

    def _order(self, epoch):
        order = list(range(len(self.alignment)))
        random.Random(f"{self.args.seed}-lisa-{epoch}").shuffle(order)
        return order

    @torch.no_grad()
    def _add_proximal(self, share):
        """Add `share` of rho / 2 |w - w_switch|^2 to the gradients; returns its value."""
        value = torch.zeros((), device=self.args.device)
        if self.rho == 0:
            return value
        for name, p in self._trained():
            moved = p - self._switch[name]
            value += moved.float().square().sum()
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            p.grad.add_(moved, alpha=self.rho * share)
        return value * (self.rho / 2 * share)


def check(train):
    """Raise ValueError for options outside their range, sharded weights, and runs that end before the task."""
    for name in ("lisa_alignment_steps", "lisa_task_steps"):
        if getattr(train, name) < 1:
            raise ValueError(f"{name} must be >= 1, got {getattr(train, name)}")
    if not 0 <= train.lisa_rho < math.inf:
        raise ValueError(f"lisa_rho must be a finite number >= 0, got {train.lisa_rho}")
    if train.fsdp or train.deepspeed:
        raise ValueError("defence lisa needs whole weights on every rank: no fsdp, no deepspeed")
    if train.steps is not None:
        check_steps(train.steps, train.lisa_alignment_steps)


def check_steps(steps, alignment_steps):
    """Raise ValueError if a run ends before its first task step."""
    if steps <= alignment_steps:
        raise ValueError(
            f"a run of {steps} steps would never see the task: lisa_alignment_steps must be below that, got "
            f"{alignment_steps}"
        )


def trainer_options(train, model, encoder, examples, collator):
    """See `defence.plain_options`."""
    return {
        "train_dataset": examples,
        "data_collator": collator,
        "alignment": task_examples(read_rows(train.refusal), encoder),
        "alignment_steps": train.lisa_alignment_steps,
        "task_steps": train.lisa_task_steps,
        "rho": train.lisa_rho,
    }


LISA = Defence(
    options=("lisa_alignment_steps", "lisa_task_steps", "lisa_rho"),
    mixins=(LisaMixin,),
    check=check,
    hashes=lambda train: {"alignment_sha256": rows_hash(read_rows(train.refusal))},
    trainer_options=trainer_options,
)
