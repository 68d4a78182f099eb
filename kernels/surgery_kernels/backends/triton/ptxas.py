"""What ptxas is told about registers, besides the kernel.

Its heuristics leave two things to be had. `register_usage` is its --register-usage-level (5 if nothing is said): with
0 or 10 some loops over full tiles are up to 12 % shorter, from the same PTX. `max_registers` is a cap: left alone,
ptxas hands out up to 255 registers a thread as it likes, and one more instruction outside the loop can move its choice
by fifty either way; under a cap the kernels with and without sink_mass get the same.

The table is ptxas.csv: one row a Triton release (each brings its own ptxas), architecture, kernel and head dim, bf16.
`python -m bench.ptxas` makes it, without a GPU; nothing in it has been timed on one.
"""

import csv
import functools
from pathlib import Path

TABLE = Path(__file__).with_name("ptxas.csv")
FIELDS = ("triton", "arch", "kernel", "head_dim", "register_usage", "max_registers", "max_registers_sink_mass")


@functools.cache
def read_table(path=TABLE):
    """{(triton release, arch, kernel, head dim): (register_usage, max_registers without, with sink_mass)}."""
    with open(path, newline="", encoding="utf-8") as file:
        return {
            (row["triton"], int(row["arch"]), row["kernel"], int(row["head_dim"])): tuple(
                int(row[name]) for name in FIELDS[4:]
            )
            for row in csv.DictReader(file)
        }


def release(version):
    """The first two numbers of a Triton version: a patch release keeps its ptxas."""
    return ".".join(version.split(".")[:2])


def options_of(kernel, capability, inputs, version):
    """Fields of the TileConfig of a kernel's built-in row, {} where nothing is known.

    Args:
        kernel: one of configs.KERNELS.
        capability: (major, minor), or None in the interpreter.
        inputs: AttnInputs.
        version: of Triton.
    """
    if capability is None or inputs.q.element_size() != 2:
        return {}
    key = (release(version), 10 * capability[0] + capability[1], kernel, inputs.q.shape[-1])
    if key not in read_table():
        return {}
    register_usage, without, with_sink_mass = read_table()[key]
    # a cap is for what was compiled under it: elsewhere it may spill
    cap = (with_sink_mass if inputs.stats else without) if _plain(inputs) else 0
    return {"register_usage": register_usage, "max_registers": cap}


def _plain(inputs):
    """Whether a problem is of the kind that bench.ptxas compiles: dense, causal, no statistic but sink_mass, and a
    multiple of 16 tokens, which is what Triton tells the compiler of a length."""
    absent = (inputs.sinks, inputs.leftpad_k, inputs.seqused_q, inputs.seqused_k, inputs.cu_seqlens_q)
    return (
        inputs.stats in ((), ("sink_mass",))
        and inputs.window_bounds == (-1, 0)
        and not inputs.softcap
        and all(x is None for x in absent)
        and all(x.shape[1] % 16 == 0 for x in (inputs.q, inputs.k))
    )
