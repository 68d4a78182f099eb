"""SurgeryTrainer: transformers' Trainer with the regulariser built in."""

from pathlib import Path

from transformers import Trainer, TrainerCallback

from .callback import SurgeryCallback
from .run_files import UNMEASURED, write_json


def add_surgery(trainer, callback):
    """Add a SurgeryCallback to a trainer, as its `surgery`."""
    trainer.surgery = callback.attach(trainer)
    trainer.add_callback(callback)


class MarkCheckpoints(TrainerCallback):
    """Marks the checkpoints of a run without SurgeryCallback as complete."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_save(self, args, state, control, **kwargs):
        # every rank has written its part
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            write_json(
                Path(args.output_dir, f"checkpoint-{state.global_step}", UNMEASURED), {"step": state.global_step}
            )


class SurgeryTrainerMixin:
    """Adds a `SurgeryCallback` to a Trainer class; every other argument goes to that class.

    Args:
        surgery_config: SurgeryConfig; default the paper's.
        harmful, refusal: probe data, see `data.read_rows`.
        manifest: further entries of the run's manifest, JSON types.
    """

    def __init__(self, *args, surgery_config=None, harmful=None, refusal=None, manifest=None, **kwargs):
        callback = SurgeryCallback(surgery_config, harmful, refusal, manifest=manifest)
        super().__init__(*args, **kwargs)
        add_surgery(self, callback)

    def train(self, resume_from_checkpoint=None, **kwargs):
        if isinstance(resume_from_checkpoint, str):
            self.surgery.resume_from = resume_from_checkpoint
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)


class SurgeryTrainer(SurgeryTrainerMixin, Trainer):
    """transformers.Trainer with `surgery_config`, `harmful` and `refusal`, see `SurgeryTrainerMixin`."""
