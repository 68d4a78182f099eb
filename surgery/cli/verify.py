"""Compare the regulariser's gradients with eager autograd (`output_attentions=True`) on your model and settings.

One small batch of your probe rows, or of the built-in ones. The exit status is 1 when the gradients differ by more
than rounding.

    surgery verify --model demo --method lora --gradient-checkpointing
"""

from .flags import add_flags, picked, print_result, summary_table


def add_arguments(parser):
    from ..config import SurgeryConfig

    parser.add_argument("--model", default="demo", help="folder, Hugging Face id, or demo")
    parser.add_argument("--harmful", help="harmful probe rows (default: built-in)")
    parser.add_argument("--refusal", help="refusal probe rows (default: built-in)")
    parser.add_argument("--method", choices=("full", "lora"), default="full", help="(default: full)")
    parser.add_argument("--gradient-checkpointing", choices=("off", "non-reentrant", "reentrant"), default="off")
    parser.add_argument("--bf16", action="store_true", help="compare under bf16 autocast, against eager's own noise")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="float32: worst relative error (default: 1e-4)")
    add_flags(parser.add_argument_group("regulariser"), SurgeryConfig)


def run(arguments):
    import torch

    from ..config import SurgeryConfig
    from ..data import ProbeData
    from ..demo_files import demo_file
    from ..finetune import with_lora
    from ..models import load_model, pick_device
    from ..verify import verify

    options = {"preset": "paper", "pairs_per_step": 2, "max_length": 64, **picked(arguments, SurgeryConfig)}
    config = SurgeryConfig.from_preset(**options)
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
    harmful = arguments.harmful or demo_file("probe_harmful")
    refusal = arguments.refusal or demo_file("probe_refusal")
    batches = ProbeData(harmful, refusal, tokenizer, config).batches(0)
    autocast = torch.bfloat16 if arguments.bf16 else None
    found = verify(model.to(pick_device()), config, *batches, autocast, arguments.tolerance)
    result = {**vars(found), "passed": found.passed}
    print_result(result, arguments.json, summary_table(result))
    return 0 if found.passed else 1
