"""What `run_training` asks of a defence."""

from collections.abc import Callable
from dataclasses import dataclass, field


def plain_options(train, model, encoder, examples, collator):
    """Arguments of the trainer; called before adapters are put on the model.

    Args:
        train: TrainConfig.
        model: as it was loaded.
        encoder: RowEncoder of the task.
        examples: see `data.task_examples`.
        collator: DataCollatorForSeq2Seq.
    Returns:
        dict of train_dataset, data_collator and what the defence's mixins take.
    """
    return {"train_dataset": examples, "data_collator": collator}


@dataclass(frozen=True, kw_only=True)
class Defence:
    """A row of DEFENCES; without arguments, plain fine-tuning.

    Attributes:
        options: fields of TrainConfig that belong to it.
        arguments: further options of TrainingArguments.
        mixins: classes put before Trainer.
        check: TrainConfig -> None; raises ValueError for what the defence cannot do.
        task_rows: (TrainConfig, the user's rows) -> the rows to train on.
        hashes: TrainConfig -> dict of sha256 of the further data it trains on; a resumed run must have the same.
        trainer_options: see `plain_options`.
    """

    options: tuple = ()
    arguments: dict = field(default_factory=dict)
    mixins: tuple = ()
    check: Callable = lambda train: None
    task_rows: Callable = lambda train, rows: rows
    hashes: Callable = lambda train: {}
    trainer_options: Callable = plain_options
