"""What a judge is, and the table of judges.

A judge reads (request, answer, context) and says harmful, refusal, both, or neither; None where it does not say, or
where its output could not be read. Unread outputs are counted, never guessed.
"""

from dataclasses import dataclass, field
from importlib import import_module
from typing import NamedTuple, Protocol

from ..judges import is_refusal


class Exchange(NamedTuple):
    """What a judge reads.

    Attributes:
        request, answer: as the model got and gave them.
        context, behavior: the two parts of a HarmBench request with a context, or None.
    """

    request: str
    answer: str
    context: str | None = None
    behavior: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one answer; every field but `judged` may be None.

    Attributes:
        harmful: bool, the answer does what it must not.
        refusal: bool, the answer declines.
        score: float in [0, 1], how harmful.
        labels: names of categories.
        judged: False if the judge's output could not be read.
    """

    harmful: bool | None = None
    refusal: bool | None = None
    score: float | None = None
    labels: tuple = field(default=())
    judged: bool = True


class Judge(Protocol):
    """Anything with a name and a method `judge`."""

    name: str

    def judge(self, exchanges):
        """list of Exchange -> list of Verdict, in order."""


class StringJudge:
    """Phrase rules: refusal only, see `judges.is_refusal`. It cannot tell a harmful answer from a harmless one."""

    name = "string"

    def judge(self, exchanges):
        return [Verdict(refusal=is_refusal(one.answer)) for one in exchanges]


# name -> (module, class, hub id of the published weights); None: needs no model
JUDGES = {
    "string": (None, None, None),
    "beaver-dam": ("moderation", "BeaverDam", "PKU-Alignment/beaver-dam-7b"),
    "harmbench": ("generative", "HarmBench", "cais/HarmBench-Llama-2-13b-cls"),
    "sorry-bench": (
        "generative",
        "SorryBench",
        "sorry-bench/ft-mistral-7b-instruct-v0.2-sorry-bench-202406",
    ),
    "strongreject": ("strongreject", "StrongReject", "qylu4156/strongreject-15k-v1"),
    "llama-guard": ("generative", "LlamaGuard", "meta-llama/Llama-Guard-3-8B"),
    "wildguard": ("generative", "WildGuard", "allenai/wildguard"),
}


def load_judge(spec, batch_size=8, dtype="float32", template=None):
    """A judge by name.

    Args:
        spec: "NAME" or "NAME=MODEL", MODEL a folder or hub id with the judge's weights.
        batch_size: answers a forward.
        dtype: of the weights, see `models.DTYPES`.
        template: a text file to use in the place of the judge's own prompt, for judges that have one.
    Returns:
        Judge.
    Raises:
        ValueError: unknown judge, a model for a judge that needs none, nothing to load.
    """
    name, _, model = spec.partition("=")
    if name not in JUDGES:
        raise ValueError(f"unknown judge {name!r}; known: {', '.join(JUDGES)}")
    module, class_name, published = JUDGES[name]
    if module is None:
        if model or template:
            raise ValueError(f"the judge {name} takes neither a model nor a template, got {model or template!r}")
        return StringJudge()
    judge = getattr(import_module(f".{module}", __package__), class_name)
    return judge.load(model or published, batch_size=batch_size, dtype=dtype, template=template)
