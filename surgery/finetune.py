"""One fine-tuning run of a chat model under a defence: what `surgery train` and the demo do."""

import json
import random
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from .baselines import DEFENCES, check_defence
from .config import option
from .data import RowEncoder, read_rows, rows_hash, task_examples
from .models import DTYPES, load_model
from .run_files import complete_checkpoints, write_json

RUN_CONFIG = "run_config.json"
# options that may change when a run goes on with another number of ranks
PER_RANK = {"number", "batch_size", "accumulation", "pairs_per_step", "probe_chunk_size"}


@dataclass(kw_only=True)
class TrainConfig:
    """Options of `surgery train` besides SurgeryConfig's. Raises ValueError on a value outside its range."""

    model: str = option("demo", "folder, Hugging Face id, or demo (SmolLM2-135M-Instruct)")
    data: str = option(None, "task rows: JSON lines with prompt and response (or messages), or a data set id")
    harmful: str = option(None, "harmful probe rows")
    refusal: str = option(None, "refusal probe rows")
    output: str = option(None, "folder of the run; must not hold a run yet, unless --resume")
    limit: int | None = option(None, "use so many task rows in all")
    mix: str | None = option(None, "rows mixed into the task rows: poisoned user data, or refusals")
    mix_ratio: float = option(0.0, "share of mixed rows among all rows, in [0, 1)")
    defence: str = option("surgery", "what keeps the model safe; see surgery/README.md", choices=tuple(DEFENCES))
    mixing_ratio: float = option(0.03, "refusal_mixing: refusals added, as a share of the task rows, in (0, 1]")
    lisa_alignment_steps: int = option(100, "lisa: optimizer steps on refusals that begin a cycle")
    lisa_task_steps: int = option(900, "lisa: optimizer steps on the task that end a cycle")
    lisa_rho: float = option(1.0, "lisa: weight of the proximal term")
    constrained_betas: str | tuple = option(
        (0.5, 2.0, 2.0, 2.0, 2.0, 0.1),
        "constrained: beta of each response token like 0.5,2,0.1; the last one holds for all later tokens",
    )
    method: str = option("full", "what is trained", choices=("full", "lora"))
    steps: int | None = option(None, "optimizer steps; default: --epochs")
    epochs: float = option(1.0, "passes over the task rows")
    batch_size: int = option(4, "sequences of a micro-batch")
    accumulation: int = option(1, "micro-batches of an optimizer step")
    learning_rate: float = option(1e-5, "constant learning rate of AdamW")
    max_length: int = option(512, "longest task sequence, tokens (the probe's is --probe-max-length)")
    bf16: bool = option(True, "bf16 autocast")
    weights: str = option(
        "float32", "dtype of the weights; in bfloat16 most updates of a small learning rate round away", choices=DTYPES
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward")
    compile: bool = option(False, "torch.compile the model")
    fsdp: bool = option(False, "shard the model over all ranks with FSDP2 (through accelerate, on GPUs)")
    deepspeed: str | None = option(None, "JSON file of DeepSpeed options, ZeRO-2 or ZeRO-3")
    lora_rank: int = option(16, "rank of LoRA adapters on all linear layers")
    log_every: int = option(5, "steps between log lines")
    save_every: int = option(50, "steps between checkpoints")
    save_limit: int = option(2, "checkpoints kept")
    run_seed: int = option(0, "seed of the task order and of new weights")
    resume: bool = option(False, "go on from the last complete checkpoint in --output")

    def __post_init__(self):
        for name in ("data", "harmful", "refusal", "output"):
            if not getattr(self, name):
                raise ValueError(f"{name} is needed: give --{name}")
        lowest = {"batch_size": 1, "accumulation": 1, "max_length": 2, "lora_rank": 1, "log_every": 1, "save_every": 1}
        for name, low in {**lowest, "save_limit": 1, "run_seed": 0}.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be >= {low}, got {getattr(self, name)}")
        for name in ("limit", "steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not 0 <= self.mix_ratio < 1:
            raise ValueError(f"mix_ratio must be in [0, 1), got {self.mix_ratio}")
        if (self.mix_ratio > 0) != (self.mix is not None):
            raise ValueError("mix and mix_ratio go together: give both or neither")
        if not self.epochs > 0 or not self.learning_rate > 0:
            raise ValueError(f"epochs and learning_rate must be > 0, got {self.epochs} and {self.learning_rate}")
        if self.method not in ("full", "lora"):
            raise ValueError(f"method must be full or lora, got {self.method!r}")
        if self.fsdp and self.deepspeed:
            raise ValueError("fsdp and deepspeed exclude each other: give one")
        if self.fsdp and not torch.cuda.is_available():
            raise ValueError("fsdp needs GPUs: without one accelerate would train with DDP instead, and not say so")
        if self.deepspeed:
            self._check_deepspeed()
        check_defence(self)

    def _check_deepspeed(self):
        if not Path(self.deepspeed).is_file():
            raise ValueError(f"deepspeed: no such file {self.deepspeed}")
        gather = "stage3_gather_16bit_weights_on_model_save"
        zero = json.loads(Path(self.deepspeed).read_text(encoding="utf-8")).get("zero_optimization", {})
        if zero.get("stage") == 3 and not zero.get(gather):
            raise ValueError(f"{self.deepspeed}: ZeRO-3 saves no weights unless zero_optimization has {gather}: true")

    @classmethod
    def from_dict(cls, options):
        """From a mapping. Raises ValueError on unknown options."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise ValueError(f"unknown options {unknown}; known: {sorted(known)}")
        return cls(**options)


def run_training(train, surgery, progress=True, callbacks=()):
    """Fine-tune, save the model, history and manifest into `train.output`.

    Args:
        train: TrainConfig.
        surgery: SurgeryConfig. With another defence than surgery lambda_sink must be 0, which measures the divergence
            only, or None instead: no measurement.
        progress: show Trainer's progress bar.
        callbacks: further TrainerCallbacks.
    Returns:
        the trainer, after training.
    Raises:
        ValueError: no defence or two; the output folder holds a run and resume is off; resume with another config;
            bad data.
    """
    from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer

    from .callback import SurgeryCallback
    from .trainer import MarkCheckpoints, add_surgery

    _check_one_defence(train, surgery)
    defence = DEFENCES[train.defence]
    rows = defence.task_rows(train, task_rows(train))
    # before the model: DeepSpeed and FSDP2 decide how it is loaded
    arguments = training_arguments(train, disable_tqdm=not progress, **defence.arguments)
    if train.deepspeed:
        import deepspeed

        # accelerate leaves this out on CPUs, and ZeRO-3 would load the weights as if for one rank
        deepspeed.init_distributed()
    options = {
        "train": {**asdict(train), "resume": False, "constrained_betas": list(train.constrained_betas)},
        "surgery": {} if surgery is None else surgery.to_dict(),
        "data": {"task_sha256": rows_hash(rows), **defence.hashes(train)},
        "ranks": {"number": arguments.world_size},
    }
    checkpoint = check_output(train, options)
    model, tokenizer = load_model(train.model, train.weights)
    encoder = RowEncoder(tokenizer, train.max_length, surgery is None or surgery.chat)
    examples, collator = task_examples(rows, encoder), DataCollatorForSeq2Seq(tokenizer)
    # before the adapters: a defence may ask the untouched model
    parts = defence.trainer_options(train, model, encoder, examples, collator)
    if train.method == "lora":
        model = with_lora(model, train.lora_rank, train.run_seed)
    trainer_class = type("DefenceTrainer", (*defence.mixins, Trainer), {})
    trainer = trainer_class(model, arguments, processing_class=tokenizer, callbacks=list(callbacks), **parts)
    if surgery is None:
        trainer.add_callback(MarkCheckpoints(trainer))
    else:
        add_surgery(trainer, SurgeryCallback(surgery, train.harmful, train.refusal, manifest=options))
        trainer.surgery.resume_from = checkpoint
    if not progress:
        # it prints every log line to standard output, where --json must be alone
        trainer.remove_callback(PrinterCallback)
    # not earlier: a run that fails on its input leaves no folder behind, and all ranks have looked at the folder
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        Path(train.output).mkdir(parents=True, exist_ok=True)
        write_json(Path(train.output, RUN_CONFIG), options)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_model(Path(train.output, "model"))
    return trainer


def _check_one_defence(train, surgery):
    if train.defence == "surgery" and surgery is None:
        raise ValueError("defence surgery needs a SurgeryConfig; without any defence it is defence plain")
    if train.defence != "surgery" and surgery is not None and surgery.lambda_sink > 0:
        raise ValueError(
            f"defence {train.defence} with lambda_sink {surgery.lambda_sink:g} would be two defences at once: "
            f"lambda_sink 0 measures the divergence only"
        )


def check_output(train, options):
    """Check the output folder against `train.resume`; returns the checkpoint to resume from, or None.

    Args:
        train: TrainConfig.
        options: JSON types of everything that makes the run, as run_config.json holds them.
    Raises:
        ValueError: it holds a run and resume is off; resume without a run, with other options or other data.
    """
    folder = Path(train.output)
    saved = folder / RUN_CONFIG
    if not train.resume:
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} exists and is not empty: choose another --output, or --resume to go on")
        return None
    if not saved.is_file():
        raise ValueError(f"{folder} holds no run to resume ({RUN_CONFIG} is missing)")
    before = json.loads(saved.read_text(encoding="utf-8"))
    # a run from before there was a choice
    before["train"].setdefault("defence", "surgery")
    for defence in DEFENCES.values():
        for name in defence.options:
            before["train"].setdefault(name, options["train"][name])
    may_change = {"output"}
    if before.setdefault("ranks", options["ranks"]) != options["ranks"]:
        sizes = [_sequences_a_step(one) for one in (before, options)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"cannot resume on {options['ranks']['number']} ranks with {sizes[1]} task sequences a step, it was "
                f"{sizes[0]}: set --batch-size or --accumulation so that their product with the ranks is the same"
            )
        may_change |= PER_RANK
    changed = [
        f"{name} was {before[part].get(name)!r}, is {options[part].get(name)!r}"
        for part in options
        for name in {**before[part], **options[part]}
        if before[part].get(name) != options[part].get(name) and name not in may_change
    ]
    if changed:
        raise ValueError(f"cannot resume with another config: {'; '.join(changed)}")
    checkpoints = complete_checkpoints(folder)
    return checkpoints[-1] if checkpoints else None


def _sequences_a_step(options):
    return options["train"]["batch_size"] * options["train"]["accumulation"] * options["ranks"]["number"]


def task_rows(train):
    """The task rows with the mixed ones among them, in the order of `run_seed`.

    With n rows in all, int(mix_ratio * n) come from `mix`, as in the paper's experiments.

    Raises:
        ValueError: a file has fewer rows than asked for.
    """
    rows = read_rows(train.data)
    if train.mix is None:
        return rows[: train.limit]
    mixed = read_rows(train.mix)
    total = train.limit or int(len(rows) / (1 - train.mix_ratio))
    n_mixed = int(train.mix_ratio * total)
    for name, have, need in (("data", len(rows), total - n_mixed), ("mix", len(mixed), n_mixed)):
        if have < need:
            raise ValueError(
                f"--{name} has {have} rows, {need} are needed for {total} with mix_ratio {train.mix_ratio}"
            )
    rows = rows[: total - n_mixed] + mixed[:n_mixed]
    random.Random(train.run_seed).shuffle(rows)
    return rows


def training_arguments(train, **overrides):
    """transformers.TrainingArguments of a TrainConfig."""
    from transformers import TrainingArguments

    if train.fsdp:
        sharding = {"fsdp_version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "reshard_after_forward": True}
        overrides = {"fsdp": "full_shard", "fsdp_config": sharding, **overrides}
    return TrainingArguments(
        output_dir=train.output,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.accumulation,
        max_steps=train.steps or -1,
        num_train_epochs=train.epochs,
        learning_rate=train.learning_rate,
        lr_scheduler_type="constant",
        bf16=train.bf16,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=train.gradient_checkpointing,
        torch_compile=train.compile,
        deepspeed=train.deepspeed,
        logging_steps=train.log_every,
        logging_first_step=True,
        save_steps=train.save_every,
        save_total_limit=train.save_limit,
        seed=train.run_seed,
        report_to=[],
        **overrides,
    )


def with_lora(model, rank, seed):
    """`model` with LoRA adapters on all linear layers, their first weights drawn from `seed`."""
    from peft import LoraConfig, get_peft_model

    # Trainer seeds after the model is made; the adapters' first weights belong to the run too
    torch.manual_seed(seed)
    model.enable_input_require_grads()
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)
