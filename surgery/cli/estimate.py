"""Memory of a training step before it starts, from the real model code on fake tensors: no weights, no arithmetic.

Compares plain fine-tuning, Surgery and the paper's own way (eager attention maps).

    surgery estimate --model llama3-8b --task-batch 4 --task-length 1024 --probe-pairs 4 --lora 16
    surgery estimate --model llama3-8b --engine fsdp2 --ranks 8 --gradient-checkpointing      (of one of 8 devices)
"""

from .flags import print_result, text_table

GIB = 2**30


def add_arguments(parser):
    from ..estimate import AUTOCAST, DTYPES, ENGINES, METHODS, OPTIMIZERS, SHAPES

    parser.add_argument("--model", default="llama3-8b", help=f"{', '.join(SHAPES)}, a folder, or a Hugging Face id")
    parser.add_argument("--method", choices=METHODS, help="one method only")
    parser.add_argument("--task-batch", type=int, default=1, help="sequences of a micro-batch (default: 1)")
    parser.add_argument("--task-length", type=int, default=1024, help="their tokens (default: 1024)")
    parser.add_argument("--probe-pairs", type=int, default=4, help="probe sequences of each side (default: 4)")
    parser.add_argument("--probe-length", type=int, default=512, help="their tokens (default: 512)")
    parser.add_argument("--dtype", choices=(*DTYPES, AUTOCAST), default="bfloat16", help="(default: bfloat16)")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--lora", type=int, help="rank of LoRA adapters on the attention projections; default: full")
    parser.add_argument("--accumulation", action="store_true", help="gradients are there before the micro-step")
    parser.add_argument("--engine", choices=ENGINES, default="none", help="(default: none, one device)")
    parser.add_argument("--ranks", type=int, default=1, help="devices of the engine (default: 1)")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="(default: adamw)")


def run(arguments):
    from ..estimate import METHODS, estimate_step

    result, rows = {}, []
    parts = ("parameters", "gradients", "optimizer", "activations", "engine", "total")
    for method in [arguments.method] if arguments.method else METHODS:
        found = estimate_step(
            arguments.model,
            method=method,
            task_batch=arguments.task_batch,
            task_length=arguments.task_length,
            probe_pairs=arguments.probe_pairs,
            probe_length=arguments.probe_length,
            dtype=arguments.dtype,
            checkpointing=arguments.gradient_checkpointing,
            lora=arguments.lora,
            gradients_resident=True if arguments.accumulation else None,
            optimizer=arguments.optimizer,
            engine=arguments.engine,
            ranks=arguments.ranks,
        )
        result[method] = {part: getattr(found, part) for part in parts}
        rows.append((method, *(f"{getattr(found, part) / GIB:.3f}" for part in parts)))
    print_result(result, arguments.json, text_table(("method", *parts), rows) + "\n(GiB; bytes with --json)")
    return 0
