"""Versions, devices, and for a few typical problems which kernel backend would run, in which order they are tried and
why the others would not."""

from .flags import print_result, text_table

# name -> (q shape, k shape, dtype, options) of a typical problem
PROBLEMS = {
    "training, bf16": ((1, 256, 4, 64), (1, 256, 2, 64), "bfloat16", {}),
    "training, bf16, 4096 tokens": ((1, 4096, 4, 128), (1, 4096, 2, 128), "bfloat16", {}),
    "training, fp32": ((1, 256, 4, 64), (1, 256, 2, 64), "float32", {}),
    "sliding window, bf16": ((1, 256, 4, 64), (1, 256, 2, 64), "bfloat16", {"window_size": (127, -1)}),
    "softcap, all statistics": (
        (1, 256, 4, 64),
        (1, 256, 2, 64),
        "float32",
        {"softcap": 50.0, "stats": ("sink_mass", "entropy", "max_logit")},
    ),
}


def add_arguments(parser):
    parser.epilog = "No option changes anything: the command only looks."


def run(arguments):
    import surgery_kernels as sk
    import torch

    from ..models import pick_device
    from ..run_files import git_commit, versions

    device = pick_device()
    backends = {}
    for name, (q_shape, k_shape, dtype, options) in PROBLEMS.items():
        q, k = (torch.zeros(shape, dtype=getattr(torch, dtype), device=device) for shape in (q_shape, k_shape))
        inputs = sk.make_inputs(q, k, k, **options)
        backends[name] = {
            "auto": sk.choose_backend(inputs),
            "order": sk.backend_order(inputs),
            "reasons against": sk.backend_reasons(inputs),
        }
    result = {
        "versions": versions(),
        "git_commit": git_commit(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "backends": backends,
    }
    rows = [(name, version or "not installed") for name, version in result["versions"].items()]
    rows += [("device", result["device"]), ("threads", result["threads"])]
    table = text_table(("what", "found"), rows) + "\n\n"
    choices = []
    for name, found in backends.items():
        against = found["reasons against"]
        choices.append((name, found["auto"], "", ""))
        choices += [("", b, why, "; ".join(against[b]) or "can run") for b, why in found["order"].items()]
    header = ("problem", "backend", "place", "cannot because")
    print_result(result, arguments.json, table + text_table(header, choices))
    return 0
