"""Time and memory of a whole optimizer step: plain fine-tuning, Surgery on our kernels, and the paper's own way.

    python -m bench.train_step --model smollm2-135m --lengths 512,1024,2048 --train full,lora

One optimizer step = `accumulation` micro-batches of [batch, length] random tokens, cross entropy on all logits,
AdamW; and for the regularised methods `pairs` harmful and refusal sequences of the same length. Every method runs on
the same model in one process, interleaved, and is compared in fp32 with the paper's way before anything is timed.
Memory is measured in a process of its own for each method. Probes as released: sink token 0, rows 1 and on.
`paper` is the released way (eager attention, all logits, a loop over heads), `paper_stacked` a kinder one.

Metrics of the CSV (p50, p20, p80 over the repetitions):
    correctness        relative error of the penalty and of its gradient (2-norm), the worse; unit pass or red
    step_time          s, the optimizer's step included
    task_throughput    tokens/s of the task batch only
    regulariser_share  1 - plain's median time / this one's
    peak_live          bytes of live tensors at the peak: parameters, gradients, optimizer state, activations
    peak_rss           bytes, largest resident set less the resident set before the step (CPU)
    peak_cuda          bytes, torch.cuda.max_memory_allocated (CUDA)
    peak_estimated     bytes as peak_live, by surgery.estimate, only where the real step ran out of memory
A row of unit oom has no value.
"""

import argparse
import gc
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch

import surgery
from surgery.estimate import SHAPES, add_lora, estimate_step, shape_config
from surgery.live_memory import LiveMemory, optimizer_state
from surgery.paper_way import paper_penalty

from .arguments import lengths, names
from .out_of_memory import is_out_of_memory, limit_memory, release
from .records import environment, quantiles, write_csv
from .train_step_report import COLUMNS, print_targets, table

LAMBDA = 300.0
TOLERANCE = 1e-4
GATE_LENGTHS = (48, 64)
WARM_UP_LENGTH = 32
LORA_RANK = 16
RESULT = "RESULT "
# for the tests of this tool
TINY = {"tiny": {**surgery.families.TINY, "model_type": "llama", "max_position_embeddings": 512}}
MODELS = {**SHAPES, **TINY}


def _plain(step, task, harmful, refusal):
    step.task(task)


def _plain_same_tokens(step, task, harmful, refusal):
    step.backward(step.loss(torch.cat((harmful, refusal))))
    step.task(task)


def _surgery(step, task, harmful, refusal):
    step.backward(step.surgery_penalty(harmful, refusal))
    step.task(task)


def _paper(step, task, harmful, refusal, loop=True):
    # one backward through the first micro-batch and both probes, as released
    penalty = step.paper_penalty(harmful, refusal, loop)
    step.backward(penalty + step.loss(task[0]) / len(task))
    step.task(task[1:], len(task))


def _paper_stacked(step, task, harmful, refusal):
    _paper(step, task, harmful, refusal, loop=False)


class Method(NamedTuple):
    """attention: implementation of the whole step; run: (Step, task, harmful, refusal) -> None, all backwards;
    penalty: (Step, harmful, refusal) -> scalar, None for a method without one."""

    attention: str
    run: callable
    penalty: callable = None


METHODS = {
    "plain": Method("sdpa", _plain),
    "plain_same_tokens": Method("sdpa", _plain_same_tokens),
    "surgery": Method("surgery", _surgery, lambda step, *probes: step.surgery_penalty(*probes)),
    "paper": Method("eager", _paper, lambda step, *probes: step.paper_penalty(*probes, loop=True)),
    "paper_stacked": Method("eager", _paper_stacked, lambda step, *probes: step.paper_penalty(*probes, loop=False)),
}


class Step:
    """A model with its optimizer, and the pieces that the methods are made of."""

    def __init__(self, options):
        torch.manual_seed(0)
        self.options = options
        self.device = options.device
        if options.weights == "demo":
            from surgery.demo_model import load_demo_model

            model = load_demo_model()[0]
        else:
            from transformers import AutoConfig, AutoModelForCausalLM

            config = AutoConfig.for_model(**TINY[options.model]) if options.model in TINY else options.model
            model = AutoModelForCausalLM.from_config(shape_config(config), dtype=torch.float32)
        model = model.to(self.device).train()
        self.vocab_size = model.config.vocab_size
        self.base = surgery.patch_model(model)
        if options.checkpointing == "on":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if options.train == "lora":
            model = add_lora(model, LORA_RANK)
            if options.checkpointing == "on":
                model.enable_input_require_grads()
        self.model = model
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=1e-5)
        config = surgery.SurgeryConfig(lambda_sink=LAMBDA, sinks=1, rows="non_sink")
        self.regularizer = surgery.SurgeryRegularizer(model, config)
        self.autocast = options.dtype == "bf16-autocast"

    def cast(self):
        return torch.autocast(self.device, torch.bfloat16) if self.autocast else nullcontext()

    def use(self, method):
        """Switch the model to the attention of `method`."""
        attention = METHODS[method].attention
        if self.base.config._attn_implementation != attention:
            self.base.set_attn_implementation(attention)

    def tokens(self, *shape, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, self.vocab_size, shape, generator=generator).to(self.device)

    def inputs(self, length, seed):
        """(task [accumulation, batch, T], harmful [pairs, T], refusal [pairs, T]), new ones for every seed."""
        o = self.options
        task = self.tokens(o.accumulation, o.batch, length, seed=3 * seed)
        probes = (self.tokens(o.pairs, length, seed=3 * seed + i) for i in (1, 2))
        return task, *probes

    def loss(self, ids):
        with self.cast():
            return self.model(input_ids=ids, labels=ids, use_cache=False).loss

    def backward(self, loss):
        loss.backward()

    def task(self, micro_batches, parts=None):
        for ids in micro_batches:
            self.backward(self.loss(ids) / (parts or len(micro_batches)))

    def surgery_penalty(self, harmful, refusal):
        harmful, refusal = _as_batch(harmful), _as_batch(refusal)
        with self.cast():
            return self.regularizer(harmful, refusal)

    def paper_penalty(self, harmful, refusal, loop):
        with self.cast():
            return paper_penalty(self.model, _as_batch(harmful), _as_batch(refusal), LAMBDA, loop)

    def __call__(self, method, inputs):
        """One optimizer step; gradients do not outlive it."""
        METHODS[method].run(self, *inputs)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.synchronize()

    def synchronize(self):
        if self.device == "cuda":
            torch.cuda.synchronize()


def _as_batch(probe):
    return probe if isinstance(probe, dict) else {"input_ids": probe}


def gate(step, methods):
    """Relative error of each method's penalty and gradient against the paper's way, in fp32, one side padded.

    Both orders of the two sides are compared, so that each head's divergence is positive in one of them.

    Returns:
        dict method -> the largest error; methods without a penalty are left out.
    """
    padded, full = ({"input_ids": step.tokens(2, length, seed=length)} for length in GATE_LENGTHS)
    padded["attention_mask"] = torch.ones_like(padded["input_ids"])
    padded["attention_mask"][1, GATE_LENGTHS[0] // 2 :] = 0
    autocast, step.autocast = step.autocast, False
    errors = {method: 0.0 for method in methods if METHODS[method].penalty}
    for probes in ((padded, full), (full, padded)):
        step.use("paper")
        # not through METHODS: the entry may be what is wrong
        wanted = _penalty_and_gradient(step, paper_penalty(step.model, *probes, LAMBDA))
        for method in errors:
            step.use(method)
            got = _penalty_and_gradient(step, METHODS[method].penalty(step, *probes))
            # 0 against 0 is right: no head is positive in this order
            error = max(float((x - y).norm() / (y.norm() or 1.0)) for x, y in zip(got, wanted, strict=True))
            errors[method] = max(errors[method], error)
    step.autocast = autocast
    return errors


def _penalty_and_gradient(step, value):
    value.backward()
    gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in step.trainable]
    gradient = torch.cat([g.flatten() for g in gradient])
    step.optimizer.zero_grad(set_to_none=True)
    return value.detach(), gradient


def measure_times(step, methods, length, steps, seconds):
    """Step times, methods interleaved, after one warm-up of each on a short batch.

    Args:
        steps: repetitions; stops earlier, between repetitions, when `seconds` have passed.
    Returns:
        dict method -> list of seconds, or None when it ran out of memory.
    """
    times = {method: [] for method in methods}
    for method in methods:
        step.use(method)
        step(method, step.inputs(WARM_UP_LENGTH, 0))
    begin = time.perf_counter()
    for repetition in range(steps):
        inputs = step.inputs(length, 1 + repetition)
        for method in methods:
            if times[method] is None:
                continue
            step.use(method)
            start = time.perf_counter()
            if _runs(step, method, inputs):
                times[method].append(time.perf_counter() - start)
            else:
                times[method] = None
        if time.perf_counter() - begin > seconds:
            break
    return times


def _runs(step, method, inputs):
    """One step; False when it runs out of memory."""
    try:
        step(method, inputs)
        return True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # outside the handler: the traceback no longer holds the step's tensors
    step.optimizer.zero_grad(set_to_none=True)
    release(step.device)
    return False


def measure_memory(step, method, length):
    """dict of peak metrics in bytes of one step, or None when it ran out of memory.

    Parameters, optimizer state and the warm-up's leftovers exist before the step and are in peak_live only.
    """
    step.use(method)
    step(method, step.inputs(WARM_UP_LENGTH, 0))
    inputs = step.inputs(length, 1)
    gc.collect()
    if step.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return {"peak_cuda": torch.cuda.max_memory_allocated()} if _runs(step, method, inputs) else None
    before = _resident_set(reset=True)
    alive = (step.model.parameters(), step.model.buffers(), optimizer_state(step.optimizer))
    with LiveMemory(*alive) as memory:
        ran = _runs(step, method, inputs)
    return {"peak_rss": _resident_set() - before, "peak_live": memory.peak} if ran else None


def _resident_set(reset=False):
    """Bytes: the largest resident set since the last reset; with reset=True the present one."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])


def worker(options):
    """Body of a child process: prints one line of JSON."""
    if options.device == "cpu":
        limit_memory()
    step = Step(options)
    if options.worker == "memory":
        result = measure_memory(step, options.methods[0], options.lengths[0])
    else:
        errors = gate(step, options.methods)
        sound = [m for m in options.methods if errors.get(m, 0.0) <= TOLERANCE]
        times = {method: [] for method in sound}
        if "time" in options.measure:
            times = measure_times(step, sound, options.lengths[0], options.steps, options.seconds)
        result = {"errors": errors, "times": times}
    print(RESULT + json.dumps(result))


def _child(options, kind, methods, length, train, checkpointing):
    """The result of a worker process; None when it was killed for memory."""
    command = [sys.executable, "-m", "bench.train_step", "--worker", kind]
    for name in ("model", "weights", "batch", "pairs", "accumulation", "steps", "seconds", "dtype", "device"):
        command += [f"--{name}", str(getattr(options, name))]
    command += ["--methods", ",".join(methods), "--lengths", str(length), "--measure", ",".join(options.measure)]
    command += ["--train", train, "--checkpointing", checkpointing]
    # freed memory goes back at once, so that the resident set follows the tensors
    environ = {**os.environ, **({"MALLOC_MMAP_THRESHOLD_": "65536"} if kind == "memory" else {})}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if lines:
        return json.loads(lines[-1][len(RESULT) :])
    if done.returncode == -9 or any(w in done.stderr for w in ("can't allocate memory", "MemoryError", "bad_alloc")):
        return None
    raise RuntimeError(f"worker failed ({done.returncode}): {' '.join(command[1:])}\n{done.stderr[-3000:]}")


def case_rows(options, length, train, checkpointing, run=_child):
    """All CSV rows of one (length, train, checkpointing), as dicts without the environment's columns."""
    case = (length, train, checkpointing)
    common = {
        "mode": f"step_accumulation{options.accumulation}",
        "shape": options.model if options.weights == "random" else "demo",
        "length": length,
        "batch": options.batch,
        "pairs": options.pairs,
        "dtype": options.dtype,
        "train": train,
        "checkpointing": checkpointing,
    }

    def row(impl, metric, unit, values=()):
        p50, p20, p80 = quantiles(values) if values else ("", "", "")
        return {**common, "impl": impl, "metric": metric, "unit": unit, "p50": p50, "p20": p20, "p80": p80}

    timed = run(options, "time", options.methods, *case) or {"errors": {}, "times": dict.fromkeys(options.methods)}
    errors, times = timed["errors"], timed["times"]
    rows = [row(m, "correctness", "pass" if error <= TOLERANCE else "red", [error]) for m, error in errors.items()]
    plain = statistics.median(times["plain"]) if times.get("plain") else None
    for method, seconds in times.items():
        if seconds is None:
            rows.append(row(method, "step_time", "oom"))
        elif seconds:
            tokens = options.batch * options.accumulation * length
            rows.append(row(method, "step_time", "s", seconds))
            rows.append(row(method, "task_throughput", "tokens/s", [tokens / s for s in seconds]))
            if plain and not method.startswith("plain"):
                rows.append(row(method, "regulariser_share", "1", [1 - plain / s for s in seconds]))
        if "memory" not in options.measure:
            continue
        peaks = run(options, "memory", [method], *case)
        for metric, value in (peaks or {}).items():
            rows.append(row(method, metric, "byte", [value]))
        if peaks is None:
            rows.append(row(method, "peak_live" if options.device == "cpu" else "peak_cuda", "oom"))
            rows += [row(method, "peak_estimated", "byte", [x]) for x in _estimate(options, method, *case)]
    return rows


def _estimate(options, method, length, train, checkpointing):
    if method == "plain_same_tokens" or options.model in TINY:
        return []
    estimate = estimate_step(
        options.model,
        method="paper" if method.startswith("paper") else method,
        task_batch=options.batch,
        task_length=length,
        probe_pairs=options.pairs,
        probe_length=length,
        dtype=options.dtype,
        checkpointing=checkpointing == "on",
        lora=LORA_RANK if train == "lora" else None,
        # the paper's maps live in the first micro-step, which finds no gradients yet
        gradients_resident=train == "lora" or (options.accumulation > 1 and not method.startswith("paper")),
    )
    return [estimate.total]


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m bench.train_step",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="smollm2-135m", choices=list(MODELS), help="shape")
    add("--weights", default="random", choices=("random", "demo"), help="demo: the real SmolLM2-135M-Instruct")
    add("--lengths", default="512,1024,2048", type=lengths, help="tokens of task and probe sequences")
    add("--methods", default=",".join(METHODS), type=names(METHODS))
    add("--train", default="full", type=names(("full", "lora")))
    add("--checkpointing", default="off", type=names(("off", "on")))
    add("--measure", default="time,memory", type=names(("time", "memory")), help="memory does not mind a busy machine")
    add("--batch", default=2, type=int, help="sequences of a micro-batch")
    add("--accumulation", default=2, type=int, help="micro-batches of an optimizer step")
    add("--pairs", default=1, type=int, help="harmful and refusal sequences of a step, each")
    add("--steps", default=5, type=int, help="repetitions")
    add("--seconds", default=120.0, type=float, help="no new repetition of a case after this time")
    add("--dtype", default="float32", choices=("float32", "bf16-autocast"))
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    add("--csv", default=None, help="file that the rows are appended to")
    add("--worker", choices=("time", "memory"), help=argparse.SUPPRESS)
    return parser


def main(argv=None):
    """Returns 0, or 1 when a method is wrong."""
    parser = _parser()
    options = parser.parse_args(argv)
    for name in ("batch", "accumulation", "pairs", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.weights == "demo" and options.model != "smollm2-135m":
        parser.error("--weights demo are SmolLM2's: leave --model at smollm2-135m")
    if options.worker:
        options.train, options.checkpointing = options.train[0], options.checkpointing[0]
        worker(options)
        return 0
    known = environment(options.device)
    rows = []
    for train in options.train:
        for checkpointing in options.checkpointing:
            for length in options.lengths:
                new = [{**row, **known} for row in case_rows(options, length, train, checkpointing)]
                rows += new
                print(table(new), flush=True)
                if options.csv:
                    write_csv(options.csv, new, COLUMNS)
    print_targets(rows)
    return int(any(row["unit"] == "red" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
