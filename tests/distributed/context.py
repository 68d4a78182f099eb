"""One rank: probes split along the sequence, against its own eager and unsplit truth. argv: style, output."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import start_group
from tiny import eager_truth, gradients, probe_batches, tiny_model, worst_error

import surgery
from surgery.context_parallel import split_probes, sum_gradients


def adapted():
    from peft import LoraConfig, get_peft_model

    model = tiny_model()
    torch.manual_seed(7)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


def penalty_errors(make, batches, config=None, checkpointing="off", scale=1.0, style="ring", **truth_options):
    """[relative error of the value, worst of the gradients] after summing over ranks."""
    value, truth = eager_truth(make(), *batches, **truth_options)
    model = surgery.patch_model(make())
    if checkpointing != "off":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    if checkpointing == "reentrant":
        model.enable_input_require_grads()
    config = config or surgery.SurgeryConfig(sinks=1)
    regularizer = surgery.SurgeryRegularizer(model, config)
    with split_probes(model, style=style):
        if config.probe_chunk_size or config.divergence == "global":
            penalty = regularizer.backward(*batches)
        else:
            penalty = regularizer(*batches)
            (penalty * scale).backward()
    sum_gradients(model)
    assert value > 0
    return [abs(penalty.item() - value) / value, worst_error(gradients(model, scale), truth)]


def value_errors(make, batch, style, **options):
    """[largest difference of sink_mass, whether find_sinks agrees] between split and unsplit."""
    model = surgery.patch_model(make())
    whole, found = surgery.sink_mass(model, **batch, **options), surgery.find_sinks(model, batch)
    with split_probes(model, style=style):
        split = surgery.sink_mass(model, **batch, **options)
        agrees = torch.equal(surgery.find_sinks(model, batch), found)
    assert (surgery.sink_mass(model, **batch, **options) == whole).all()
    return [(split - whole).abs().max().item(), agrees]


def low_precision(style):
    """[ours, eager's]: worst gradient error of one bf16 autocast step against float32 eager."""
    batches = probe_batches()
    _, truth = eager_truth(tiny_model(), *batches)
    with torch.autocast("cpu", torch.bfloat16):
        model = tiny_model()
        joined = surgery.rows.join(*(surgery.rows.as_probe_batch(b) for b in batches))
        value = surgery.verify.eager_penalty(model, joined, 2, 1, "non_sink", 300.0)
    value.backward()
    noise = worst_error(gradients(model), truth)
    model = surgery.patch_model(tiny_model())
    with split_probes(model, style=style), torch.autocast("cpu", torch.bfloat16):
        penalty = surgery.SurgeryRegularizer(model, surgery.SurgeryConfig(sinks=1))(*batches)
    penalty.backward()
    sum_gradients(model)
    return [worst_error(gradients(model), truth), noise]


def raised(call):
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refusals(style, rank):
    found = {}
    model = surgery.patch_model(tiny_model())

    def different():
        ids = torch.full((1, 6), 5 + rank)
        with split_probes(model, style=style):
            surgery.sink_mass(model, ids)

    def nested():
        with split_probes(model, style=style), split_probes(model, style=style):
            pass

    found["different batches"] = raised(different)
    found["nested"] = raised(nested)
    found["style"] = raised(lambda: split_probes(model, style="zigzag").__enter__())
    if style == "ring":
        windows = surgery.patch_model(tiny_model("mistral"))
        by_reference = surgery.patch_model(tiny_model(), backend="reference")
        for name, one in (("window", windows), ("reference", by_reference)):

            def measure(one=one):
                with split_probes(one, style=style):
                    surgery.sink_mass(one, torch.full((1, 12), 5))

            found[name] = raised(measure)
    else:
        odd = surgery.patch_model(tiny_model(num_key_value_heads=1))
        found["heads"] = raised(lambda: split_probes(odd, style=style).__enter__())
    return found


def main():
    style, output = sys.argv[1], Path(sys.argv[2])
    rank, ranks = start_group()
    right, left, masked = probe_batches(), probe_batches(left=True), probe_batches(row_mask=True)
    config = surgery.SurgeryConfig
    errors = {
        "full": penalty_errors(tiny_model, right, style=style),
        "scaled": penalty_errors(tiny_model, right, scale=1024.0, style=style),
        "left padding": penalty_errors(tiny_model, left, style=style),
        "sinks 0 and 4": penalty_errors(tiny_model, right, config(sinks=(0, 4)), style=style, sinks=(0, 4)),
        "response rows": penalty_errors(
            tiny_model, masked, config(sinks=3, rows="response"), style=style, sinks=3, rows="response"
        ),
    }
    values = {
        "right": value_errors(tiny_model, right[0], style),
        "left": value_errors(tiny_model, left[0], style, sinks=(1, 3)),
    }
    if ranks == 2:
        errors |= {
            f"{name}, {checkpointing}": penalty_errors(one, right, checkpointing=checkpointing, style=style)
            for name, one in (("full", tiny_model), ("lora", adapted))
            for checkpointing in ("non-reentrant", "reentrant")
        }
        # the ranks hold the same sequences, so that the global d is the local one; the engine would average
        errors["global"] = penalty_errors(tiny_model, right, config(sinks=1, divergence="global"), style=style)
        errors["chunks"] = penalty_errors(tiny_model, right, config(sinks=1, probe_chunk_size=2), style=style)
        # softcap, and windows where they are known
        layers = {} if style == "ulysses" else {"layer_types": ["full_attention"] * 3}
        errors["gemma2"] = penalty_errors(lambda: tiny_model("gemma2", **layers), right, style=style)
    written = {"errors": errors, "values": values, "bf16": low_precision(style) if ranks == 2 else None}
    written["refusals"] = refusals(style, rank) if ranks == 2 else {}
    output.write_text(json.dumps(written), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


main()
