"""Compare the regulariser's gradients with eager autograd (`output_attentions=True`) on your model and settings.

One small batch of your probe rows, or of the built-in ones. The exit status is 1 when the gradients differ by more
than rounding.

    surgery verify --model demo --method lora --gradient-checkpointing reentrant

Under torchrun, with --engine: what reaches the optimizer after the engine's reduction, every rank with its own pairs.

    torchrun --nproc_per_node 2 -m surgery verify --model demo --engine fsdp2
"""

import os

from .flags import add_flags, picked, print_result, summary_table


def add_arguments(parser):
    from ..config import SurgeryConfig
    from ..verify_ranks import ENGINES

    parser.add_argument("--model", default="demo", help="folder, Hugging Face id, or demo")
    parser.add_argument("--harmful", help="harmful probe rows (default: built-in)")
    parser.add_argument("--refusal", help="refusal probe rows (default: built-in)")
    parser.add_argument("--method", choices=("full", "lora"), default="full", help="(default: full)")
    parser.add_argument("--gradient-checkpointing", choices=("off", "non-reentrant", "reentrant"), default="off")
    parser.add_argument("--bf16", action="store_true", help="compare under bf16 autocast, against eager's own noise")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="float32: worst relative error (default: 1e-4)")
    parser.add_argument("--engine", choices=ENGINES, help="wrap the model so; only under torchrun")
    add_flags(parser.add_argument_group("regulariser"), SurgeryConfig)


def run(arguments):
    import torch

    from ..config import SurgeryConfig
    from ..data import ProbeData
    from ..demo_files import demo_file
    from ..models import pick_device
    from ..verify import verify

    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if (ranks > 1) != (arguments.engine is not None):
        raise ValueError("--engine and torchrun go together: give both or neither")
    if arguments.engine and arguments.bf16:
        raise ValueError("--bf16 is compared without --engine only: engines are checked in float32")
    options = {"preset": "paper", "pairs_per_step": 2, "max_length": 64, **picked(arguments, SurgeryConfig)}
    config = SurgeryConfig.from_preset(**options)
    harmful = arguments.harmful or demo_file("probe_harmful")
    refusal = arguments.refusal or demo_file("probe_refusal")
    if arguments.engine:
        found, rank = _in_engine(arguments, config, harmful, refusal)
    else:
        rank, autocast = 0, torch.bfloat16 if arguments.bf16 else None
        model, tokenizer = _prepared(arguments)
        batches = ProbeData(harmful, refusal, tokenizer, config).batches(0)
        found = verify(model.to(pick_device()), config, *batches, autocast, arguments.tolerance)
    result = {**vars(found), "passed": found.passed}
    if rank == 0:
        print_result(result, arguments.json, summary_table(result))
    return 0 if found.passed else 1


def _prepared(arguments):
    """(model, tokenizer) with adapters and checkpointing as asked for, in train mode where that matters."""
    from ..finetune import with_lora
    from ..models import load_model

    model, tokenizer = load_model(arguments.model)
    if arguments.method == "lora":
        model = with_lora(model, rank=8, seed=0)
    if arguments.gradient_checkpointing != "off":
        reentrant = arguments.gradient_checkpointing == "reentrant"
        if reentrant:
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        # checkpointing is only active in train mode
        model.train()
    return model, tokenizer


def _in_engine(arguments, config, harmful, refusal):
    """(Verification, this process's rank)."""
    import torch
    import torch.distributed as dist

    from ..data import ProbeData
    from ..models import pick_device
    from ..verify_ranks import verify_injected, wrap_in_engine

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        model, tokenizer = _prepared(arguments)
        # the first rank's copy stays as it is loaded: eager, unwrapped
        reference = _prepared(arguments)[0].to(pick_device()) if rank == 0 else None
        model = wrap_in_engine(model.to(pick_device()), arguments.engine)
        batches = ProbeData(harmful, refusal, tokenizer, config, rank, ranks).batches(0)
        return verify_injected(model, reference, config, *batches, arguments.tolerance), rank
    finally:
        dist.destroy_process_group()
