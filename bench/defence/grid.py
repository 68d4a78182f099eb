"""The cells of the experiment and the recipes that they train and are evaluated by."""

from dataclasses import asdict, dataclass, field

PAPER_LAMBDA = 300.0
POISON = (0.0, 0.05, 0.1, 0.2)
# the ratio at which everything else is varied
MIDDLE = 0.1


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How every cell of a run trains and is evaluated.

    Attributes:
        rows: task rows of a run, poisoned ones among them; steps, batch_size, learning_rate: of AdamW, constant.
        longest_task: only task rows up to so many tokens; max_length: where task rows are cut.
        align_*: of the alignment stage that makes the start `aligned`.
        prompt_stride: every so many-th evaluation prompt; answer_tokens: longest answer.
        losses: held-out rows of each loss and of the measurement.
        accuracy: GSM8K problems answered, in up to task_tokens.
    """

    rows: int
    steps: int
    batch_size: int
    learning_rate: float
    longest_task: int
    max_length: int
    probe_length: int
    pairs: int
    align_steps: int
    align_batch: int
    align_learning_rate: float
    prompt_stride: int
    answer_tokens: int
    losses: int
    accuracy: int
    task_tokens: int


RECIPES = {
    # what two CPU cores do in minutes a cell
    "cpu": Recipe(
        rows=160,
        steps=40,
        batch_size=4,
        learning_rate=5e-5,
        longest_task=160,
        max_length=160,
        probe_length=96,
        pairs=2,
        align_steps=60,
        align_batch=8,
        align_learning_rate=2e-5,
        prompt_stride=2,
        answer_tokens=40,
        losses=60,
        accuracy=48,
        task_tokens=140,
    ),
    # the paper's numbers, for a GPU
    "paper": Recipe(
        rows=1000,
        steps=500,
        batch_size=10,
        learning_rate=5e-6,
        longest_task=512,
        max_length=512,
        probe_length=512,
        pairs=4,
        align_steps=120,
        align_batch=16,
        align_learning_rate=2e-5,
        prompt_stride=1,
        answer_tokens=128,
        losses=400,
        accuracy=500,
        task_tokens=512,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One fine-tuning run and its evaluation.

    Attributes:
        start: "chat" (SmolLM2-135M-Instruct as it is) or "aligned" (after an alignment stage, see splits.py).
        defence: of `surgery train --defence`, or "none": the start itself, not trained.
        poison: share of harmful rows among the task rows.
        seed: of the rows' order and the probes' order.
        surgery: SurgeryConfig options that differ from the recipe's.
        train: TrainConfig options that differ from the recipe's.
    """

    start: str = "aligned"
    defence: str = "surgery"
    poison: float = MIDDLE
    seed: int = 0
    surgery: dict = field(default_factory=dict)
    train: dict = field(default_factory=dict)

    @property
    def method(self):
        """What the table calls it."""
        options = {**self.surgery, **self.train}
        if self.defence == "surgery":
            options.setdefault("lambda_sink", PAPER_LAMBDA)
        words = [self.defence] + [
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in sorted(options.items())
        ]
        return " ".join(words)

    @property
    def key(self):
        """Names the cell in files."""
        return f"{self.start} p={self.poison:g} {self.method} seed={self.seed}"

    def to_dict(self):
        return asdict(self)


def cells(seeds):
    """Every cell, the most telling first: the core with all seeds, then the rest, seed by seed.

    Args:
        seeds: how many.
    """
    yield Cell(defence="none", poison=0.0)
    yield Cell(start="chat", defence="none", poison=0.0)
    for part in (CORE, REST):
        for seed in range(seeds):
            for one in part:
                yield Cell(seed=seed, **one)


CORE = (
    {"defence": "plain"},
    {"defence": "surgery"},
    {"defence": "refusal_mixing"},
    {"defence": "surgery", "surgery": {"lambda_sink": 3000.0}},
    {"defence": "surgery", "surgery": {"preset": "upstream"}},
)
REST = (
    *({"defence": name, "poison": p} for p in POISON if p != MIDDLE for name in ("plain", "surgery", "refusal_mixing")),
    *({"defence": "surgery", "surgery": {"lambda_sink": weight}} for weight in (30.0, 3.0)),
    # why it may not help: a rate that moves everything
    *({"defence": name, "train": {"learning_rate": 1e-5}} for name in ("plain", "surgery")),
    {"defence": "lisa", "train": {"lisa_alignment_steps": 4, "lisa_task_steps": 16}},
    {"defence": "constrained"},
    # weights that cannot move: the released code trains them in bfloat16 at this rate
    *({"defence": "plain", "train": {"learning_rate": 5e-6, **dtype}} for dtype in ({}, {"weights": "bfloat16"})),
    {"defence": "surgery", "train": {"learning_rate": 5e-6, "weights": "bfloat16"}},
    # a noisy probe, the rows that count
    {"defence": "surgery", "surgery": {"pairs_per_step": 8}},
    {"defence": "surgery", "surgery": {"rows": "response", "max_length": 256}},
    # a start with little to lose
    *({"start": "chat", "defence": name} for name in ("plain", "surgery", "refusal_mixing")),
    # as many refusals as poisoned rows
    {"defence": "refusal_mixing", "train": {"mixing_ratio": 0.1}},
    {"defence": "surgery", "surgery": {"lambda_sink": 30000.0}},
    {"defence": "surgery", "surgery": {"sinks": 4}},
    {"defence": "surgery", "train": {"learning_rate": 5e-6}},
)
