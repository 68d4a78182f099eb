"""Peak memory of a probe of one long sequence: sink mass, the search for the sink, the penalty with its backward.

    python -m bench.long_context --model smollm2-135m --layers 2 --lengths 8192,16384,32768
    python -m bench.long_context --fake --model llama3.2-1b --lengths 32768,65536,131072

One process, batch 1 (the penalty: 1 harmful and 1 refusal sequence, every layer checkpointed), random tokens. Without
--fake the model is run, and time is measured; with it the same code runs on fake tensors, which count the bytes of any
shape without computing: weights in bf16, and the temporaries of our own operators left out; the search for the sink,
a loop over blocks of rows, is only run.

Metrics of the CSV:
    peak_live   GiB of tensors above the weights (live_memory.py)
    peak_rss    GiB of the process above its size before the first length; not with --fake
    seconds     one run; not with --fake
    growth      peak_live over that of half the length; 2 is linear in the length, 4 quadratic
"""

import argparse
import re
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch._subclasses import FakeTensorMode
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import surgery
from surgery.estimate import SHAPES, shape_config
from surgery.live_memory import LiveMemory
from surgery.patch import attention_modules
from surgery.probe import Probe, Relay

from .records import environment, write_csv
from .train_step_report import COLUMNS

METHODS = ("sink_mass", "find_sinks", "penalty")
GIB = 2**30


def build(name, layers, fake):
    """A patched model of a known shape, checkpointed in training, on fake tensors if asked for."""
    config = shape_config(name)
    config.num_hidden_layers = layers or config.num_hidden_layers
    config.max_position_embeddings = max(config.max_position_embeddings, 2**17)
    dtype = torch.bfloat16 if fake else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return surgery.patch_model(model)


def run(model, method, length):
    """One real run through the public functions."""
    ids = torch.randint(3, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model.train(method == "penalty")
    if method == "sink_mass":
        surgery.sink_mass(model, **batch)
    elif method == "find_sinks":
        surgery.find_sinks(model, batch)
    else:
        surgery.SurgeryRegularizer(model, surgery.SurgeryConfig(sinks=1))(batch, batch).backward()


def run_fake(model, method, length):
    """The same pass without the checks around it, which read values."""
    n = 2 if method == "penalty" else 1
    ids = torch.zeros(n, length, dtype=torch.int64)
    layers, heads = len(attention_modules(model)), model.config.num_attention_heads
    kind = "penalty" if method == "penalty" else "mass"
    recorded, bounds = torch.zeros(layers, n, heads), torch.tensor([[0, length]] * n, dtype=torch.int32)
    probe = Probe(kind, recorded, bounds, torch.zeros(n, length), None, 1, n // 2)
    model.train(method == "penalty")
    with nullcontext() if method == "penalty" else torch.no_grad():
        logits = model(
            ids, attention_mask=torch.ones_like(ids).bool(), use_cache=False, logits_to_keep=1, surgery_ctx=probe
        ).logits
        if method == "penalty":
            Relay.apply(logits, recorded.sum(), 1.0, probe, lambda: None).backward()


def rss(field):
    """GiB of this process: VmRSS now, or VmHWM, the largest since the last `reset_peak`."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / GIB


def reset_peak():
    Path("/proc/self/clear_refs").write_text("5")


def measure(model, method, length, fake, base_rss):
    """dict of metrics, without growth."""
    model.zero_grad()
    if fake:
        with LiveMemory(model.parameters(), model.buffers()) as memory:
            run_fake(model, method, length)
        return {"peak_live": (memory.peak - memory.resident) / GIB}
    reset_peak()
    start = time.perf_counter()
    with LiveMemory(model.parameters(), model.buffers()) as memory:
        run(model, method, length)
    seconds = time.perf_counter() - start
    return {
        "peak_live": (memory.peak - memory.resident) / GIB,
        "peak_rss": rss("VmHWM") - base_rss,
        "seconds": seconds,
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="decoder layers, default the model's")
    parser.add_argument("--lengths", default="8192,16384,32768", help="tokens, rising")
    parser.add_argument("--methods", help=f"out of {', '.join(METHODS)}; default all that can be measured")
    parser.add_argument("--fake", action="store_true", help="count bytes on fake tensors")
    parser.add_argument("--csv", help="append the rows there")
    options = parser.parse_args(argv)
    allowed = [method for method in METHODS if not (options.fake and method == "find_sinks")]
    lengths = [int(n) for n in options.lengths.split(",")]
    methods = options.methods.split(",") if options.methods else allowed
    if unknown := set(methods) - set(allowed):
        parser.error(f"--methods must be out of {', '.join(allowed)}, got {', '.join(sorted(unknown))}")
    logging.set_verbosity_error()
    shape = options.model + (f"-{options.layers}layers" if options.layers else "")
    with FakeTensorMode(allow_non_fake_inputs=True) if options.fake else nullcontext():
        model = build(options.model, options.layers, options.fake)
        base_rss, rows, peaks = rss("VmRSS"), [], {}
        for length in lengths:
            for method in methods:
                found = measure(model, method, length, options.fake, base_rss)
                peaks[method, length] = found["peak_live"]
                if (method, length // 2) in peaks:
                    found["growth"] = found["peak_live"] / peaks[method, length // 2]
                print(shape, method, length, ", ".join(f"{name} {x:.4g}" for name, x in found.items()), flush=True)
                rows += [
                    {"impl": "surgery", "mode": method, "shape": shape, "length": length, "metric": metric, "p50": x}
                    for metric, x in found.items()
                ]
    units = {"peak_live": "GiB", "peak_rss": "GiB", "seconds": "s", "growth": "1"}
    common = {
        "batch": 1,
        "pairs": 1,
        "dtype": "bf16-fake" if options.fake else "fp32",
        "train": "full",
        "p20": "",
        "p80": "",
        **environment("cpu"),
    }
    for row in rows:
        row |= common | {"unit": units[row["metric"]], "checkpointing": "on" if row["mode"] == "penalty" else "off"}
    if options.csv:
        write_csv(options.csv, rows, COLUMNS)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
