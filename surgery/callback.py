"""SurgeryCallback: the regulariser on any Hugging Face Trainer, once an optimizer step.

It runs in `on_step_begin`, before the task's micro-batches: its own forward and backward, so that both graphs are
never alive together, clipping sees the sum of both gradients, and accumulation does not multiply lambda.
"""

import json
import logging
import math
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from transformers import TrainerCallback

from .config import SurgeryConfig
from .data import ProbeData
from .patch import patch_model, patched, unpatch_model
from .probe import unwrap
from .regularizer import SurgeryRegularizer
from .run_files import STATE, History, write_json, write_manifest

log = logging.getLogger("surgery")
# options that may change when a run goes on with another number of ranks
PER_RANK = ("pairs_per_step", "probe_chunk_size")


class SurgeryCallback(TrainerCallback):
    """Adds the regulariser's gradient to every optimizer step of a Trainer, logs it, and survives a resume.

        callback = SurgeryCallback(SurgeryConfig(), harmful="harmful.jsonl", refusal="refusals.jsonl")
        trainer = SFTTrainer(..., callbacks=[callback])      # or any transformers.Trainer
        callback.attach(trainer)
        trainer.train()

    On one process, DDP, FSDP2 and DeepSpeed ZeRO; with divergence="per_rank" the log and the history are the first
    rank's. The model is patched when training begins and restored at its end. With lambda_sink = 0 the training is
    left bit for bit as it was: the divergence is measured under no_grad, with the model's own attention between
    probes.

    Args:
        config: SurgeryConfig; default the paper's.
        harmful, refusal: probe data, see `data.read_rows`.
        tokenizer: default the trainer's processing_class.
        trainer: the trainer, or call `attach` later.
        manifest: further entries of surgery_manifest.json, JSON types.
    """

    def __init__(self, config=None, harmful=None, refusal=None, tokenizer=None, trainer=None, manifest=None):
        if harmful is None or refusal is None:
            raise ValueError("harmful and refusal probe data are needed: JSON lines files, data set ids or iterables")
        self.config = SurgeryConfig() if config is None else config
        self.harmful, self.refusal, self.tokenizer = harmful, refusal, tokenizer
        self.resume_from = None
        self.manifest = manifest or {}
        self.regularizer = self.history = self.probe_data = None
        self._patched_here = False
        self._since_log, self._step_started, self._probe_seconds = [], 0.0, 0.0
        self.trainer = None
        if trainer is not None:
            self.attach(trainer)

    def attach(self, trainer):
        """Give the callback its trainer (its accelerator and wrapped model are needed). Returns the callback.

        Raises:
            ValueError: bad probe data.
        """
        self.trainer = trainer
        if self.tokenizer or trainer.processing_class:
            self._load_data(trainer.args)
        return self

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer is None:
            raise ValueError("SurgeryCallback has no trainer: call callback.attach(trainer) before trainer.train()")
        self._check_engine(args)
        model = self.trainer.model
        if self.probe_data is None:
            self._load_data(args)
        if self.config.lambda_sink == 0:
            with patched(model, self.config.backend):
                self.regularizer = SurgeryRegularizer(model, self.config)
        else:
            self._patched_here = getattr(unwrap(model), "_surgery_patch", None) is None
            patch_model(model, self.config.backend)
            self.regularizer = SurgeryRegularizer(model, self.config)
        if state.global_step:
            self._resume(args, state.global_step)
        if state.is_world_process_zero:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            self.history = History(args.output_dir, state.global_step)
            self.config.save(args.output_dir)
            extra = {"resumed_at_step": state.global_step, **self.manifest}
            write_manifest(args.output_dir, self.config, self.probe_data.hashes, **extra)

    def on_step_begin(self, args, state, control, **kwargs):
        self._step_started = time.perf_counter()
        # the wrapped model: DDP's and FSDP's hooks must see this pass
        model = self.trainer.model_wrapped
        self.regularizer.model = model
        harmful, refusal = self.probe_data.batches(state.global_step)
        measure_only = self.config.lambda_sink == 0
        devices = [torch.cuda.current_device()] if args.device.type == "cuda" else []
        was_training = model.training
        # dropout in the probe must not move the task's random numbers
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=devices))
            if measure_only:
                stack.enter_context(patched(model, self.config.backend))
                stack.enter_context(torch.no_grad())
            model.train(not measure_only)
            if measure_only:
                with self.trainer.compute_loss_context_manager():
                    self.regularizer(harmful, refusal)
            else:
                # with DeepSpeed accelerate's backward would step the optimizer: the regulariser uses the raw engine
                deepspeed = getattr(self.trainer, "is_deepspeed_enabled", False)
                backward = None if deepspeed else self.trainer.accelerator.backward
                self.regularizer.backward(harmful, refusal, backward, context=self.trainer.compute_loss_context_manager)
            model.train(was_training)
        self._record(state)
        self._probe_seconds = time.perf_counter() - self._step_started

    def on_step_end(self, args, state, control, **kwargs):
        report = self.regularizer.report
        seconds = time.perf_counter() - self._step_started
        self._since_log.append((report, self._probe_seconds / seconds))
        if control.should_log:
            self.trainer.log(self._metrics())
            self._since_log.clear()
            # logging clears the flag, and Trainer has its own line to log yet
            control.should_log = True

    def on_save(self, args, state, control, **kwargs):
        # every rank has written its part of the checkpoint before it is marked as complete
        self.trainer.accelerator.wait_for_everyone()
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        self.config.save(folder)
        # written last: it marks the checkpoint as complete
        saved = {
            "step": state.global_step,
            "config": self.config.to_dict(),
            "probe_data_sha256": self.probe_data.hashes,
            "pairs_used": self.probe_data.used(state.global_step),
            "ranks": self.probe_data.world_size,
        }
        write_json(folder / STATE, {**saved, "regularizer": self.regularizer.state_dict()})

    def on_train_end(self, args, state, control, **kwargs):
        if self._patched_here:
            unpatch_model(self.trainer.model)
            self._patched_here = False

    def _load_data(self, args):
        tokenizer = self.tokenizer or self.trainer.processing_class
        if tokenizer is None:
            raise ValueError("SurgeryCallback needs a tokenizer: pass tokenizer=, or processing_class to the trainer")
        # ranks that split a sequence or its heads hold the same rows; they are the inner ones of the mesh
        sizes = [getattr(self.trainer, name, lambda: 1)() for name in ("get_tp_size", "get_cp_size", "get_sp_size")]
        together = math.prod(sizes)
        self.probe_data = ProbeData(
            self.harmful,
            self.refusal,
            tokenizer,
            self.config,
            args.process_index // together,
            args.world_size // together,
        )

    def _check_engine(self, args):
        if getattr(args, "n_gpu", 1) > 1:
            raise ValueError(
                f"Trainer would use nn.DataParallel on {args.n_gpu} GPUs, whose replicas lose the statistics: start "
                f"one process a GPU (torchrun, accelerate launch), or show one GPU only (CUDA_VISIBLE_DEVICES=0)"
            )

        parallel = getattr(self.trainer.accelerator, "parallelism_config", None)
        for name in ("cp_size", "sp_size"):
            if (getattr(parallel, name, None) or 1) > 1:
                raise ValueError(
                    f"{name} must be 1, got {getattr(parallel, name)}: Trainer splits sequences only under its own "
                    f"attention. surgery.context_parallel.split_probes splits probes in a loop of your own"
                )

    def _resume(self, args, step):
        """Check that the checkpoint belongs to this config and data, and restore the regulariser's state."""
        candidates = [self.resume_from, getattr(args, "resume_from_checkpoint", None)]
        candidates.append(Path(args.output_dir, f"checkpoint-{step}"))
        folders = [Path(c) for c in candidates if isinstance(c, (str, Path)) and (Path(c) / STATE).is_file()]
        if not folders:
            raise ValueError(
                f"the run resumes at step {step}, but no {STATE} was found in checkpoint-{step} of the output folder: "
                f"set callback.resume_from to the checkpoint folder, which must come from a Surgery run"
            )
        saved = json.loads((folders[0] / STATE).read_text(encoding="utf-8"))
        now = {"config": self.config.to_dict(), "probe_data_sha256": self.probe_data.hashes}
        ranks, pairs = self.probe_data.world_size, self.config.pairs_per_step
        before = saved.get("ranks", ranks), saved["config"]["pairs_per_step"]
        if ranks != before[0]:
            # another machine: what one rank takes may change with it
            for name in PER_RANK:
                now["config"][name] = saved["config"].get(name)
            if ranks * pairs != math.prod(before):
                log.warning(
                    "resumed on %d ranks with %d probe pairs each a step, was %d with %d: each step now sees %d pairs "
                    "instead of %d",
                    *(ranks, pairs, *before, ranks * pairs, math.prod(before)),
                )
        for part, values in now.items():
            changed = {
                key: (saved[part].get(key), value) for key, value in values.items() if saved[part].get(key) != value
            }
            if changed:
                lines = "; ".join(f"{key} was {was!r}, is {value!r}" for key, (was, value) in changed.items())
                raise ValueError(f"the checkpoint was made with another {part}: {lines}")
        self.regularizer.load_state_dict(saved["regularizer"])
        self.probe_data.resume(step, saved.get("pairs_used", self.probe_data.used(step)))

    def _record(self, state):
        if self.history is None:
            return
        report = self.regularizer.report
        if report.dropped:
            self.history.append({"step": state.global_step + 1, "dropped": True})
            return
        self.history.append(
            {
                "step": state.global_step + 1,
                "penalty": float(report.penalty),
                "mean_relu_divergence": float(report.divergence.clamp_min(0).mean()),
                "positive_heads": report.positive_heads,
                "sink_mass_harmful": float(report.harmful.mean()),
                "sink_mass_refusal": float(report.refusal.mean()),
                "sink_position": report.sink_position,
                "divergence": [[round(x, 7) for x in layer] for layer in report.divergence.tolist()],
            }
        )

    def _metrics(self):
        reports = [report for report, _ in self._since_log if not report.dropped]

        def mean(values):
            return float(torch.stack([torch.as_tensor(v, dtype=torch.float32).cpu() for v in values]).mean())

        metrics = {"surgery/time_share": mean([share for _, share in self._since_log])}
        if self.config.nonfinite == "drop":
            metrics["surgery/dropped"] = self.regularizer.dropped
        if reports:
            metrics |= {
                "surgery/penalty": mean([r.penalty for r in reports]),
                "surgery/positive_heads": mean([r.positive_heads for r in reports]),
                "surgery/max_divergence": mean([r.divergence.max() for r in reports]),
                "surgery/sink_mass_harmful": mean([r.harmful.mean() for r in reports]),
                "surgery/sink_mass_refusal": mean([r.refusal.mean() for r in reports]),
            }
        return metrics
