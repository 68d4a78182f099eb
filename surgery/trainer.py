"""SurgeryTrainer: transformers' Trainer with the regulariser built in."""

from transformers import Trainer

from .callback import SurgeryCallback


def add_surgery(trainer, callback):
    """Add a SurgeryCallback to a trainer, as its `surgery`."""
    trainer.surgery = callback.attach(trainer)
    trainer.add_callback(callback)


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
