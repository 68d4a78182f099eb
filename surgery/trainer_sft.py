"""SurgerySFTTrainer: TRL's SFTTrainer with the regulariser built in."""

from trl import SFTTrainer

from .trainer import SurgeryTrainerMixin


class SurgerySFTTrainer(SurgeryTrainerMixin, SFTTrainer):
    """trl.SFTTrainer with `surgery_config`, `harmful` and `refusal`, see `SurgeryTrainerMixin`."""
