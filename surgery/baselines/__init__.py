"""The defences of `surgery train --defence`: Surgery and what it is compared with, in one trainer.

A defence is a file with a `Defence` in it, and a row here.
"""

from dataclasses import fields

from .constrained import CONSTRAINED
from .defence import Defence
from .lisa import LISA
from .refusal_mixing import REFUSAL_MIXING

DEFENCES = {
    # its callback comes on top of any trainer
    "surgery": Defence(),
    "plain": Defence(),
    "refusal_mixing": REFUSAL_MIXING,
    "lisa": LISA,
    "constrained": CONSTRAINED,
}


def check_defence(train):
    """Check a TrainConfig's defence and the options of all defences.

    Raises:
        ValueError: unknown defence, an option of another defence was changed, or one outside its range.
    """
    if train.defence not in DEFENCES:
        raise ValueError(f"defence must be one of {', '.join(DEFENCES)}, got {train.defence!r}")
    defaults = {field.name: field.default for field in fields(train)}
    for name, defence in DEFENCES.items():
        for option in defence.options:
            value = getattr(train, option)
            if name != train.defence and value != defaults[option]:
                raise ValueError(f"{option} belongs to defence {name}, but defence is {train.defence}; got {value!r}")
    DEFENCES[train.defence].check(train)
