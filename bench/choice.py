"""The speeds by which `auto` orders the backends: measured on this GPU, or estimated from published ones.

    python -m bench.choice --csv speeds.csv         measure; then SURGERY_CHOICE_TABLE=speeds.csv, or merge the rows
    python -m bench.choice --estimate --csv kernels/surgery_kernels/backends/choice.csv

Causal self-attention with sink mass, 16384 tokens, 32/8 heads, bf16; forward and backward with the gradient of every
output, TFLOP/s by 3.5 * 2 N^2 D a head. A measured row is the median of interleaved repetitions after each backend
passed its self-check.
"""

import argparse
import csv
import statistics
import sys
from pathlib import Path

import surgery_kernels as sk
import torch
from surgery_kernels.backends.choice import FIELDS

TOKENS, N_HEADS, N_KV = 16384, 32, 8
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
HEAD_DIMS = (64, 128)
BACKENDS = ("fa4", "cudnn", "flash", "triton")
PASSES = 2.5  # backward over forward
LAUNCHES, LAUNCH = 12, 3e-6  # small kernels around a vendor's, and what one costs

# Published TFLOP/s of plain attention by length, forward and backward. H100: FlashAttention-3 paper, figures 5 and 6,
# causal forward; its backward is given without a mask and scaled by the forward's causal share. FA4 is taken as FA3.
# Triton forward: pytorch/benchmark, tutorial 06, scaled alike; Triton backward: 5/7 of FA3's, as it computes seven
# products where one pass with atomics computes five. A100: FlashAttention-2's own figure, forward and backward
# together; Triton 3.5 / 4.5 of it for the same reason. B200 and GB200: flash-attention and cudnn-frontend
# repositories; Triton 1 / 2.7 of FA4 (FA4 paper).
FA3_128 = (198, 317, 418, 492, 521, 533)
FA3_64 = (161, 245, 340, 400, 438, 451)
RECORDS = {
    ("9.0", "fa4", 128): ((292, 423, 521, 579, 602, 616), FA3_128),
    ("9.0", "fa4", 64): ((197, 265, 371, 420, 460, 473), FA3_64),
    ("9.0", "cudnn", 128): ((315, 410, 484, 518, 529, 539), (192, 290, 363, 424, 456, 467)),
    ("9.0", "cudnn", 64): ((225, 288, 334, 363, 379, 388), (179, 269, 334, 371, 397, 407)),
    ("9.0", "triton", 128): ((149, 286, 360, 415, 445, 456), tuple(x * 5 / 7 for x in FA3_128)),
    ("9.0", "triton", 64): ((130, 246, 292, 313, 329, 318), tuple(x * 5 / 7 for x in FA3_64)),
    ("8.0", "flash", 128): ((99, 133, 155, 173, 182, 189),) * 2,
    ("8.0", "flash", 64): ((88, 119, 140, 156, 165, 171),) * 2,
    ("8.0", "triton", 128): (tuple(x * 3.5 / 4.5 for x in (99, 133, 155, 173, 182, 189)),) * 2,
    ("8.0", "triton", 64): (tuple(x * 3.5 / 4.5 for x in (88, 119, 140, 156, 165, 171)),) * 2,
    ("10.0", "fa4", 128): ((0, 1386, 1535, 1616, 1653, 1694), (0, 1014, 1123, 1182, 1209, 1239)),
    ("10.0", "cudnn", 128): ((0, 0, 0, 1408, 1574, 1708), (0, 0, 0, 1148, 1332, 1328)),
    ("10.0", "triton", 128): (
        tuple(x / 2.7 for x in (0, 1386, 1535, 1616, 1653, 1694)),
        tuple(x / 2.7 for x in (0, 1014, 1123, 1182, 1209, 1239)),
    ),
}
# bytes per second that a copy reaches: 80 % of the data sheet
BANDWIDTH = {"8.0": 1.6e12, "9.0": 2.7e12, "10.0": 6.4e12}
# tensors of the size of q that the epilogue reads or writes, forward and backward (csrc/README.md)
TRAFFIC = {"fa4": 7, "cudnn": 10, "flash": 10, "triton": 0}


def flops(head_dim, length):
    """Forward and backward of all tokens."""
    return (1 + PASSES) * 2 * TOKENS * length * head_dim * N_HEADS


def estimated():
    """Rows of published speeds with the epilogue's bytes and launches added; nothing here was measured by us."""
    for (capability, backend, head_dim), (forward, backward) in RECORDS.items():
        for length, *speeds in zip(LENGTHS, forward, backward, strict=True):
            if not all(speeds):
                continue
            forward_flops = flops(head_dim, length) / (1 + PASSES)
            seconds = forward_flops / (speeds[0] * 1e12) + PASSES * forward_flops / (speeds[1] * 1e12)
            traffic = TRAFFIC[backend] * TOKENS * N_HEADS * head_dim * 2
            seconds += traffic / BANDWIDTH[capability] + (LAUNCHES * LAUNCH if traffic else 0.0)
            yield row(capability, backend, head_dim, length, seconds, "estimate, not measured")


def row(capability, backend, head_dim, length, seconds, source):
    tflops = f"{flops(head_dim, length) / seconds / 1e12:.1f}"
    return dict(zip(FIELDS, (capability, backend, head_dim, length, tflops, source), strict=True))


def measured(lengths, head_dims, repetitions):
    """Rows of this GPU."""
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    source = f"measured, {torch.cuda.get_device_name()}, torch {torch.__version__}"
    for head_dim in head_dims:
        for length in lengths:
            inputs = problem(length, head_dim)
            against = sk.backend_reasons(inputs)
            for name in BACKENDS:
                if against[name]:
                    print(f"{name} {head_dim} {length}: {'; '.join(against[name])}", file=sys.stderr)
            steps = {name: step_of(inputs, name) for name in BACKENDS if not against[name]}
            for name, seconds in interleaved(steps, repetitions).items():
                yield row(capability, name, head_dim, length, seconds, source)


def problem(length, head_dim, device="cuda", dtype=torch.bfloat16, tokens=TOKENS, heads=(N_HEADS, N_KV)):
    """AttnInputs of `tokens` tokens in sequences of `length`."""
    shape = (tokens // length, length)
    q, k, v = (torch.randn(*shape, n, head_dim, device=device).to(dtype) for n in (heads[0], heads[1], heads[1]))
    return sk.make_inputs(q, k, v)


def step_of(inputs, backend):
    """A function that runs forward and backward."""
    dout = torch.randn_like(inputs.q)
    dlse = torch.randn(inputs.rows_shape, device=inputs.q.device)

    def step():
        out, lse, stats = sk.attn_forward(inputs, backend)
        return sk.attn_backward(inputs, out, lse, stats, dout, dlse, dlse[None], backend)

    return step


def interleaved(steps, repetitions):
    """name -> median seconds on the current CUDA device."""
    for step in steps.values():
        for _ in range(3):
            step()
    seconds = {name: [] for name in steps}
    for _ in range(repetitions):
        for name, step in steps.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            end.synchronize()
            seconds[name].append(start.elapsed_time(end) / 1e3)
    return {name: statistics.median(times) for name, times in seconds.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--estimate", action="store_true", help="rows from published speeds, no GPU needed")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--head-dims", type=int, nargs="+", default=HEAD_DIMS)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--csv", type=Path, help="file to write")
    args = parser.parse_args(argv)
    if not args.estimate and not torch.cuda.is_available():
        parser.error("measuring needs a CUDA device; --estimate needs none")
    made = []
    for found in estimated() if args.estimate else measured(args.lengths, args.head_dims, args.repetitions):
        made.append(found)
        print(*found.values(), flush=True)
    if args.csv:
        with open(args.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
