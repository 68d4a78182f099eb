"""LLaMA-Factory: it has no plugins, so `run` stands in for `llamafactory-cli train`, with the trainer class extended.

    from surgery.integrations import llamafactory

    llamafactory.run("llama3_lora_sft.yaml", {"harmful": "harmful.jsonl", "refusal": "refusals.jsonl"})

Under torchrun every process runs the same script.
"""

import functools
import importlib
from pathlib import Path

import yaml

from ..trainer import SurgeryTrainerMixin
from . import read_options

# stage: the module that builds the trainer, and its class there
TRAINERS = {
    "pt": ("llamafactory.train.pt.workflow", "CustomTrainer"),
    "sft": ("llamafactory.train.sft.workflow", "CustomSeq2SeqTrainer"),
    "dpo": ("llamafactory.train.dpo.workflow", "CustomDPOTrainer"),
}


def run(args, options):
    """Train as `llamafactory-cli train` does, with the regulariser.

    Args:
        args: LLaMA-Factory's arguments: a mapping, or a YAML file.
        options: harmful, refusal and options of SurgeryConfig, see `read_options`.
    Raises:
        ValueError: bad options; another stage; Ray, Unsloth or Megatron, which build other trainers or attention;
            neat_packing with flash attention, whose mask numbers the packed documents.
    """
    config, harmful, refusal = read_options(options)
    args = dict(args) if isinstance(args, dict) else yaml.safe_load(Path(args).read_text(encoding="utf-8"))
    _check(args)
    from llamafactory.train.tuner import run_exp

    module, name = TRAINERS[args.get("stage", "sft")]
    module = importlib.import_module(module)
    trainer = getattr(module, name)
    extended = type(f"Surgery{name}", (SurgeryTrainerMixin, trainer), {})
    # the one way in: the workflow function looks the class up in its module
    setattr(module, name, functools.partial(extended, surgery_config=config, harmful=harmful, refusal=refusal))
    try:
        run_exp(args)
    finally:
        setattr(module, name, trainer)


def _check(args):
    stage = args.get("stage", "sft")
    if stage not in TRAINERS:
        raise ValueError(f"stage must be one of {', '.join(TRAINERS)}, got {stage!r}")
    for name in ("use_ray", "use_unsloth", "use_mca", "use_hyper_parallel"):
        if args.get(name):
            raise ValueError(f"{name} must be off: it builds another trainer or another attention than Surgery extends")
    if args.get("neat_packing") and args.get("flash_attn") not in ("sdpa", "disabled"):
        raise ValueError(
            f"neat_packing needs flash_attn: sdpa (or disabled), got {args.get('flash_attn', 'auto')!r}: with flash "
            f"attention its attention_mask numbers the documents, and they would see one another"
        )
