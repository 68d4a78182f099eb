"""One rank of test_verify_ranks.py: verify_injected in engines, right and with a gradient that is off by a little.

    python verify_run.py RESULT

Writes {engine, trained, divergence: [worst error, penalty, eager penalty]}.
"""

import json
import logging
import sys

from engines import build
from matrix import pair
from ranks import start_group

import surgery
from surgery.probe import Relay
from surgery.verify_ranks import verify_injected, wrap_in_engine


def check(engine, rank, lora=False, checkpointing="off", **options):
    reference = build(lora) if rank == 0 else None
    if rank == 0:
        # it must get the wrapped model's weights
        next(reference.parameters()).data += 1.0
    model = wrap_in_engine(build(lora, checkpointing), engine)
    found = verify_injected(model, reference, surgery.SurgeryConfig(**options), *pair(rank))
    return [found.worst_error, found.penalty, found.eager_penalty, found.passed]


def main(output):
    rank, _ = start_group()
    logging.disable(logging.WARNING)
    results = {
        "ddp": check("ddp", rank),
        "fsdp2, lora": check("fsdp2", rank, lora=True, checkpointing="reentrant", divergence="global"),
        "fsdp2, chunks": check("fsdp2", rank, probe_chunk_size=3, divergence="global"),
        "zero2": check("zero2", rank, sinks=1, divergence="global"),
        "zero3": check("zero3", rank, checkpointing="non-reentrant"),
    }
    backward = Relay.backward

    def off(ctx, gradient):
        return backward(ctx, gradient * (1 + 1e-3 * rank))

    Relay.backward = staticmethod(off)
    results["wrong"] = check("fsdp2", rank)
    with open(output, "w", encoding="utf-8") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
