"""SurgeryConfig: every option of the regulariser, its default and its check."""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import surgery_kernels as sk

from .rows import ROW_POLICIES

FILE_NAME = "surgery_config.json"
PRESETS = ("paper", "upstream")
UPSTREAM = {"sinks": 1, "pairs_per_step": 1, "double_bos": True}


def option(default, help, **kwargs):
    return field(default=default, metadata={"help": help, **kwargs})


@dataclass(kw_only=True)
class SurgeryConfig:
    """Options of the regulariser; the defaults are the paper's (`SurgeryConfig.paper()`).

    The command line's flags are made from these fields. Raises ValueError on a value outside its range.
    """

    lambda_sink: float = option(300.0, "weight of the penalty in the loss; 0 only measures (paper: 300)")
    sinks: int | str | tuple = option(
        "argmax",
        "sink keys: argmax (of total attention mass, paper eq. 1), n (the first n), or positions like 0,4",
    )
    rows: str = option("non_sink", "query rows that count", choices=ROW_POLICIES)
    pairs_per_step: int = option(4, "harmful and refusal probe sequences of one optimizer step, each")
    probe_chunk_size: int | None = option(
        None, "probe sequences of one forward, for probes that do not fit at once; costs one more forward of each"
    )
    divergence: str = option(
        "per_rank",
        "data parallel: d of each rank's own pairs, gradients averaged, or d of all ranks' pairs (one more forward)",
        choices=("per_rank", "global"),
    )
    nonfinite: str = option(
        "raise",
        "a probe on which the model's activations are NaN or infinite: stop, or leave it out and count it (costs one "
        "more forward of every probe)",
        choices=("raise", "drop"),
    )
    max_length: int = option(512, "longest probe sequence, tokens")
    sink_refresh_steps: int = option(
        50,
        "argmax: search for the sink every so many steps. While all probe sequences agree on its position, that "
        "position is used in between; otherwise every step searches",
    )
    chat: bool = option(True, "format probe rows with the tokenizer's chat template; false: prompt, newline, response")
    double_bos: bool = option(False, "add a second BOS as the released code does (upstream)")
    backend: str = option("auto", "kernel backend", choices=("auto", *sk.BACKENDS))
    seed: int = option(43, "seed of the probe order, apart from the trainer's")
    preset: str = option("paper", "label of the preset these options started from", choices=PRESETS)

    def __post_init__(self):
        self.sinks = _parse_sinks(self.sinks)
        if not isinstance(self.lambda_sink, (int, float)) or not math.isfinite(self.lambda_sink):
            raise ValueError(f"lambda_sink must be a finite number >= 0, got {self.lambda_sink!r}")
        if self.lambda_sink < 0:
            raise ValueError(f"lambda_sink must be >= 0, got {self.lambda_sink}: it would reward sink divergence")
        for name, lowest in (("pairs_per_step", 1), ("max_length", 2), ("sink_refresh_steps", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise ValueError(f"{name} must be an int >= {lowest}, got {value!r}")
        chunk = self.probe_chunk_size
        if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
            raise ValueError(f"probe_chunk_size must be an int >= 1 or None, got {chunk!r}")
        for field_ in fields(self):
            choices, value = field_.metadata.get("choices"), getattr(self, field_.name)
            if choices and value not in choices:
                raise ValueError(f"{field_.name} must be one of {', '.join(choices)}, got {value!r}")
        if self.preset == "upstream" and not any(getattr(self, name) == value for name, value in UPSTREAM.items()):
            raise ValueError(
                f"preset='upstream' is a label and sets nothing: use SurgeryConfig.upstream(), which sets {UPSTREAM}"
            )

    @classmethod
    def paper(cls, **options):
        """The paper's definitions: sink by argmax, refusals, every real row except the sink's."""
        return cls(**options)

    @classmethod
    def upstream(cls, **options):
        """What the released code does: sink at index 0, rows 1 and on, one pair a step, a second BOS.

        The released code compares harmful with merely *safe* answers (BeaverTails is_safe rows), not refusals. That
        contrast leaves the penalty hardly anything to act on: on SmolLM2-135M-Instruct 4 of 270 heads are positive
        at p < 0.05 (178 negative), against 24 (122) with refusals (bench/results/cpu/measure). Trained with it, that
        model refused two thirds of harmless requests too (bench/results/cpu/defence): read over-refusals with refusals.
        """
        return cls(**{**UPSTREAM, "preset": "upstream", **options})

    @classmethod
    def from_preset(cls, preset, **options):
        """`paper` or `upstream` by name.

        Raises:
            ValueError: unknown preset or options.
        """
        if preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
        cls._check_names(options)
        return getattr(cls, preset)(**options)

    @classmethod
    def _check_names(cls, options):
        known = {field_.name for field_ in fields(cls)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise ValueError(f"unknown SurgeryConfig options {unknown}; known: {sorted(known)}")

    @classmethod
    def from_dict(cls, options):
        """From a mapping, as written by `save`.

        Raises:
            ValueError: unknown options.
        """
        cls._check_names(options)
        return cls(**options)

    def to_dict(self):
        """Plain JSON types."""
        return {**asdict(self), "sinks": list(self.sinks) if isinstance(self.sinks, tuple) else self.sinks}

    def save(self, folder):
        """Write surgery_config.json into `folder`."""
        Path(folder, FILE_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder):
        """Read surgery_config.json from `folder`."""
        return cls.from_dict(json.loads(Path(folder, FILE_NAME).read_text(encoding="utf-8")))


def _parse_sinks(sinks):
    parsed = sinks
    if isinstance(sinks, str) and sinks != "argmax":
        # a lone number is a count, as in Python; "4," is the position 4
        parts = [part.strip() for part in sinks.split(",") if part.strip()]
        if all(part.isdigit() for part in parts):
            parsed = tuple(map(int, parts)) if "," in sinks else int(sinks)
    if isinstance(parsed, list):
        parsed = tuple(parsed)
    if parsed == "argmax" or (isinstance(parsed, int) and not isinstance(parsed, bool) and parsed >= 1):
        return parsed
    if isinstance(parsed, tuple) and parsed and all(isinstance(x, int) and x >= 0 for x in parsed):
        return parsed
    raise ValueError(f"sinks must be 'argmax', an int >= 1 (the first n) or positions >= 0, got {sinks!r}")
