"""The same fine-tuning in one process, with FSDP2 and with DeepSpeed ZeRO-3: losses step by step, and after a kill.

    python -m bench.distributed_losses --data gsm8k.jsonl --kill also --csv losses.csv

Every engine trains the same model on the same global batches with AdamW, the divergence of all ranks' pairs
(divergence="global") and two micro-batches a step. With --kill also (or only), a rank of every sharded run is killed
with -9 in its middle; the run must end with an error within a minute, resume from its last checkpoint and give the
same losses.

Columns: engine, step, task_loss (mean over the step's response tokens), penalty (lambda included), and of the run
seconds_to_end, from the kill to the end of all ranks (empty without a kill).
"""

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

import surgery
from surgery.data import ProbeData, RowEncoder, read_rows, task_examples
from surgery.demo_files import demo_file
from surgery.models import load_model, pick_device

ENGINES = ("one", "fsdp2", "zero3")
MICRO_BATCHES = 2
TOLERANCE = 1e-4
MINUTE = 60.0


class One:
    """A training step in one process; also the base of the others."""

    def __init__(self, model, learning_rate):
        self.model = self.wrap(model)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)

    def wrap(self, model):
        return model

    def micro_step(self, batch, last, weight):
        """Forward and backward of a micro-batch, its loss times `weight`; returns the loss."""
        loss = self.model(**batch, use_cache=False).loss
        self.backward(loss * weight, last)
        return loss.detach()

    def backward(self, loss, last):
        loss.backward()

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, folder):
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, folder / "state.pt")

    def load(self, folder):
        state = torch.load(folder / "state.pt")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


class Fsdp2(One):
    """fully_shard on every layer and the whole."""

    def wrap(self, model):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(pick_device().type, (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def micro_step(self, batch, last, weight):
        self.model.set_requires_gradient_sync(last)
        return super().micro_step(batch, last, weight)

    def save(self, folder):
        from torch.distributed.checkpoint import save
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self.model, self.optimizer)
        save({"model": model, "optimizer": optimizer}, checkpoint_id=folder / "dcp")

    def load(self, folder):
        from torch.distributed.checkpoint import load
        from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

        model, optimizer = get_state_dict(self.model, self.optimizer)
        load({"model": model, "optimizer": optimizer}, checkpoint_id=folder / "dcp")
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)


class Zero3(One):
    """A DeepSpeed engine that owns the optimizer."""

    def __init__(self, model, learning_rate):
        import deepspeed

        ranks = dist.get_world_size()
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "train_batch_size": MICRO_BATCHES * ranks,
            "zero_optimization": {"stage": 3, "overlap_comm": False},
            # DeepSpeed would clip to norm 1 on its own
            "gradient_clipping": 0.0,
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
        }
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
        self.model = deepspeed.initialize(model=model, config=config, optimizer=optimizer)[0]

    def backward(self, loss, last):
        self.model.set_gradient_accumulation_boundary(last)
        # undo the engine's division by the accumulation steps: the weights of the losses say it all
        self.model.backward(loss * MICRO_BATCHES)

    def step(self):
        self.model.step()

    def save(self, folder):
        self.model.save_checkpoint(str(folder))

    def load(self, folder):
        self.model.load_checkpoint(str(folder))


ENGINE_CLASSES = {"one": One, "fsdp2": Fsdp2, "zero3": Zero3}


def micro_batches(examples, step, sequences, pad_id):
    """The MICRO_BATCHES global batches of a step, each of `sequences` rows, right-padded, labels -100 on padding."""
    for micro in range(MICRO_BATCHES):
        first = (step * MICRO_BATCHES + micro) * sequences
        rows = [examples[(first + i) % len(examples)] for i in range(sequences)]
        length = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": pad_id, "attention_mask": 0, "labels": -100}
        yield {
            key: torch.tensor([row[key] + [value] * (length - len(row[key])) for row in rows])
            for key, value in fill.items()
        }


def train(options):
    """One rank of one run: appends a line a step to FOLDER/losses.jsonl, the first rank only."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    ranks, rank = 1, 0
    if options.engine != "one":
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        ranks, rank = dist.get_world_size(), dist.get_rank()
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    device = pick_device()
    torch.manual_seed(0)
    model, tokenizer = load_model(options.model)
    model = surgery.patch_model(model.to(device).train())
    engine = ENGINE_CLASSES[options.engine](model, options.learning_rate)
    config = surgery.SurgeryConfig(
        divergence="global", pairs_per_step=options.pairs // ranks, max_length=options.max_length
    )
    regularizer = surgery.SurgeryRegularizer(engine.model, config)
    probes = ProbeData(options.harmful, options.refusal, tokenizer, config, rank, ranks)
    examples = task_examples(read_rows(options.data, 256), RowEncoder(tokenizer, options.max_length))
    folder = Path(options.folder)
    start = resume(folder, engine, regularizer) if options.resume else 0
    share = slice(rank * options.sequences // ranks, (rank + 1) * options.sequences // ranks)
    for step in range(start, options.steps):
        penalty = regularizer.backward(*probes.batches(step)).item()
        batches = list(micro_batches(examples, step, options.sequences, probes.pad_id))
        tokens = sum(counted(batch["labels"]) for batch in batches)
        total = torch.zeros((), device=device)
        for number, batch in enumerate(batches):
            own = {key: value[share].to(device) for key, value in batch.items()}
            part = counted(own["labels"]) / tokens
            # engines average over ranks what must be a sum
            total += part * engine.micro_step(own, number == MICRO_BATCHES - 1, ranks * part)
        engine.step()
        if ranks > 1:
            dist.all_reduce(total)
        if rank == 0:
            with open(folder / "losses.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step + 1, "task_loss": total.item(), "penalty": penalty}) + "\n")
        if (step + 1) % options.save_every == 0 and step + 1 < options.steps:
            checkpoint(folder, step + 1, engine, regularizer, rank, ranks)
    if ranks > 1:
        dist.destroy_process_group()


def counted(labels):
    """Tokens that cross entropy counts: the first of a row is never predicted."""
    return int((labels[:, 1:] != -100).sum())


def checkpoint(folder, step, engine, regularizer, rank, ranks):
    part = folder / f"checkpoint-{step}"
    part.mkdir(exist_ok=True)
    engine.save(part)
    if ranks > 1:
        dist.barrier()
    if rank == 0:
        # written last: it marks the checkpoint as complete
        (part / "surgery.json").write_text(json.dumps(regularizer.state_dict()), encoding="utf-8")


def resume(folder, engine, regularizer):
    """Restore the last complete checkpoint; returns its step."""
    complete = sorted(folder.glob("checkpoint-*/surgery.json"), key=lambda path: int(path.parent.name.split("-")[1]))
    engine.load(complete[-1].parent)
    regularizer.load_state_dict(json.loads(complete[-1].read_text(encoding="utf-8")))
    return int(complete[-1].parent.name.split("-")[1])


def start(engine, folder, options, *more):
    """The processes of a run: Popen of python or of torchrun."""
    launcher = []
    if engine != "one":
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(options.ranks)]
    flags = []
    for name in ("model", "data", "harmful", "refusal", "steps", "sequences", "pairs", "max_length", "learning_rate"):
        flags += ["--" + name.replace("_", "-"), str(getattr(options, name))]
    command = [sys.executable, *launcher, "-m", "bench.distributed_losses", "--engine", engine, *flags]
    command += ["--folder", str(folder), "--save-every", str(options.save_every), *more]
    with open(folder / "log", "a", encoding="utf-8") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment()
        )


def environment():
    return {**os.environ, "DS_ACCELERATOR": "cuda" if torch.cuda.is_available() else "cpu"}


def finish(process, folder, timeout):
    try:
        status = process.wait(timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise RuntimeError(f"no end after {timeout} s: {tail(folder)}") from None
    return status


def tail(folder):
    return (folder / "log").read_text(encoding="utf-8")[-2000:]


def run(engine, folder, options):
    """Losses of one run from start to end.

    Returns:
        (list of dicts step, task_loss, penalty; None).
    Raises:
        RuntimeError: it failed.
    """
    folder.mkdir()
    if finish(start(engine, folder, options), folder, options.timeout):
        raise RuntimeError(f"{engine} failed: {tail(folder)}")
    return lines(folder), None


def run_killed(engine, folder, options):
    """The same with a rank killed after the first checkpoint, and a resume: (losses, seconds from kill to end)."""
    folder.mkdir()
    process = start(engine, folder, options)
    deadline = time.monotonic() + options.timeout
    while not list(folder.glob("checkpoint-*/surgery.json")):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{engine} ended before its first checkpoint: {tail(folder)}")
        time.sleep(0.05)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    killed = time.monotonic()
    if finish(process, folder, options.timeout) == 0:
        raise RuntimeError(f"{engine} ended well although a rank was killed: {tail(folder)}")
    seconds = time.monotonic() - killed
    if finish(start(engine, folder, options, "--resume"), folder, options.timeout):
        raise RuntimeError(f"{engine} did not resume: {tail(folder)}")
    return lines(folder), seconds


def lines(folder):
    """Losses by step; steps that were done again after a resume count as done last."""
    text = (folder / "losses.jsonl").read_text(encoding="utf-8")
    by_step = {line["step"]: line for line in map(json.loads, text.splitlines())}
    return [by_step[step] for step in sorted(by_step)]


def compare(found, reference):
    """Largest relative difference of a task loss, and of a penalty relative to the largest penalty."""
    if [line["step"] for line in found] != [line["step"] for line in reference]:
        raise RuntimeError(f"steps {[line['step'] for line in found]}, expected {len(reference)}")
    largest = max(line["penalty"] for line in reference)
    pairs = list(zip(found, reference, strict=True))
    return (
        max(abs(a["task_loss"] - b["task_loss"]) / b["task_loss"] for a, b in pairs),
        max(abs(a["penalty"] - b["penalty"]) for a, b in pairs) / largest,
    )


def write_csv(path, runs):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("engine", "step", "task_loss", "penalty", "seconds_to_end"))
        for name, (losses, seconds) in runs.items():
            for line in losses:
                row = (name, line["step"], f"{line['task_loss']:.7g}", f"{line['penalty']:.7g}")
                writer.writerow((*row, "" if seconds is None else f"{seconds:.1f}"))


def main(argv=None):
    """Returns 0, or 1 when an engine's losses differ or a killed run took too long."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="folder, Hugging Face id, or demo (SmolLM2-135M-Instruct)")
    parser.add_argument("--data", default=demo_file("tasks"), help="task rows: prompt, response")
    parser.add_argument("--harmful", default=demo_file("probe_harmful"), help="harmful probe rows")
    parser.add_argument("--refusal", default=demo_file("probe_refusal"), help="refusal probe rows")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2, help="processes of the sharded runs (default: 2)")
    parser.add_argument("--sequences", type=int, default=2, help="task rows of a global micro-batch (default: 2)")
    parser.add_argument("--pairs", type=int, default=2, help="probe pairs of a step, over all ranks (default: 2)")
    parser.add_argument("--max-length", type=int, default=128, help="tokens (default: 128)")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument(
        "--kill", choices=("also", "only"), help="sharded runs with a killed rank, besides whole ones or instead"
    )
    parser.add_argument("--csv", help="where the losses go")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds a run may take")
    parser.add_argument("--save-every", type=int, default=10, help="steps between checkpoints (default: 10)")
    parser.add_argument("--engine", choices=ENGINES, help="be one rank of this run (internal)")
    parser.add_argument("--folder", help="of one run (internal)")
    parser.add_argument("--resume", action="store_true", help="internal")
    options = parser.parse_args(argv)
    for name in ("sequences", "pairs"):
        if getattr(options, name) % options.ranks:
            parser.error(f"--{name} must be a multiple of --ranks={options.ranks}, got {getattr(options, name)}")
    if options.engine:
        train(options)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return compare_engines(Path(folder), options)


def compare_engines(folder, options):
    runs = {}
    for engine in ENGINES:
        if engine == "one" or options.kill != "only":
            runs[engine] = run(engine, folder / engine, options)
        if options.kill and engine != "one":
            runs[f"{engine}-killed"] = run_killed(engine, folder / f"{engine}-killed", options)
    status = 0
    for name, (losses, seconds) in runs.items():
        task, penalty = compare(losses, runs["one"][0])
        good = max(task, penalty) <= TOLERANCE and (seconds is None or seconds < MINUTE)
        status |= not good
        ended = "" if seconds is None else f", all ranks ended {seconds:.1f} s after the kill"
        print(f"{name:14} task loss {task:.1e}, penalty {penalty:.1e}{ended}: {'pass' if good else 'FAIL'}")
    if options.csv:
        write_csv(options.csv, runs)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
