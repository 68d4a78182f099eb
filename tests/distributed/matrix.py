"""One rank of test_matrix.py: every cell of an engine against single-process eager autograd.

    python matrix.py ENGINE RESULT

Writes {cell: [error of the penalty's value, worst relative gradient error], or an error's text}.
"""

import json
import sys
import traceback

import torch
import torch.distributed as dist
from engines import CHECKPOINTING, ENGINES, MICRO_BATCHES, build
from ranks import start_group
from tiny import eager_truth, worst_error

import surgery
from surgery.probe import unwrap

# mode -> options of SurgeryConfig
MODES = {
    "per_rank": {},
    "global": {"divergence": "global"},
    "chunks": {"probe_chunk_size": 2},
    "global-chunks": {"divergence": "global", "probe_chunk_size": 2},
    "drop": {"nonfinite": "drop"},
}


def pair(rank):
    """Another pair of padded batches on every rank; on some heads d has another sign than on the other rank."""
    generator = torch.Generator().manual_seed(20 + rank)
    batches = []
    for count, length in ((2, 13), (3, 10)):
        mask = torch.ones(count, length, dtype=torch.long)
        for row in range(1, count):
            mask[row, length - 2 - row :] = 0
        batches.append(
            {"input_ids": torch.randint(3, 97, (count, length), generator=generator), "attention_mask": mask}
        )
    return batches


def task(rank):
    """Micro-batches [2, 12] of a rank."""
    return torch.randint(3, 97, (MICRO_BATCHES, 2, 12), generator=torch.Generator().manual_seed(40 + rank))


def together(pairs):
    """All ranks' pairs as one."""
    return [
        {key: torch.cat([one[side][key] for one in pairs]) for key in ("input_ids", "attention_mask")}
        for side in (0, 1)
    ]


def mean(gradients):
    return {name: sum(g[name] for g in gradients) / len(gradients) for name in gradients[0]}


class Truth:
    """Gradients of the penalty and of the penalty plus task, in one process, without engine or kernels."""

    def __init__(self, lora, ranks, dtype=torch.float32, **overrides):
        self.make = lambda: eager(lora, dtype, **overrides)
        self.pairs = [pair(rank) for rank in range(ranks)]
        self.task = mean([self._task(rank) for rank in range(ranks)])
        self.local = [eager_truth(self.make(), *one) for one in self.pairs]
        self.whole = eager_truth(self.make(), *together(self.pairs))

    def _task(self, rank):
        model = self.make()
        for ids in task(rank):
            (model(ids, labels=ids, use_cache=False).loss / MICRO_BATCHES).backward()
        return {n: p.grad.float() for n, p in model.named_parameters() if p.requires_grad}

    def difference(self):
        """How far apart the two meanings are, and the task's part in the sum: what a mistake would show as."""
        per_rank, whole = (self.penalty(divergence, 0)[1] for divergence in ("per_rank", "global"))
        return [worst_error(per_rank, whole), _norm(self.task) / _norm(whole)]

    def penalty(self, divergence, rank):
        """(the value a rank reports, gradients after the engine's average)."""
        if divergence == "global":
            return self.whole[0], _float(self.whole[1])
        return self.local[rank][0], mean([_float(g) for _, g in self.local])


def eager(lora, dtype, **overrides):
    model = build(lora, **overrides).to(dtype)
    unwrap(model).set_attn_implementation("eager")
    return model


def _norm(gradients):
    return torch.stack([g.norm() for g in gradients.values()]).norm().item()


def _float(gradients):
    return {name: g.float() for name, g in gradients.items()}


def step(engine, regularizer, rank, truth, divergence, weight):
    """One optimizer step with the task's loss times `weight`: (error of the value, worst error of a gradient)."""
    value, expected = truth.penalty(divergence, rank)
    penalty = regularizer.backward(*pair(rank)).item()
    batches = task(rank)
    for number, ids in enumerate(batches):
        engine.micro_step(ids, number == len(batches) - 1, weight)
    found = engine.gradients()
    total = {name: weight * truth.task[name] + expected.get(name, 0) for name in truth.task}
    engine.end_step()
    return abs(penalty - value) / value, worst_error(found, total)


def cell(make, truth, rank, mode):
    """Worst errors of three steps: the penalty alone, twice (the second finds what the first left), then with task."""
    engine = make()
    options = MODES[mode]
    surgery.patch_model(engine.model)
    regularizer = surgery.SurgeryRegularizer(engine.model, surgery.SurgeryConfig(sinks=1, **options))
    divergence = options.get("divergence", "per_rank")
    steps = [step(engine, regularizer, rank, truth, divergence, weight) for weight in (0.0, 0.0, 1.0)]
    return [max(error) for error in zip(*steps, strict=True)]


def with_nan_token(model):
    """Token 2, which no batch holds, has a NaN embedding."""
    unwrap(model).model.embed_tokens.weight.data[2] = float("nan")
    return model


def nan_pair(rank):
    batches = pair(rank)
    if rank == dist.get_world_size() - 1:
        batches[1]["input_ids"][0, 3] = 2
    return batches


def call_an_engine(engine, rank):
    """reg(...).backward() with DeepSpeed: refused, since its scaling and stepping sit in the engine's backward."""
    surgery.patch_model(engine.model)
    surgery.SurgeryRegularizer(engine.model, surgery.SurgeryConfig(sinks=1))(*pair(rank))


def one_rank_has_nan(engine, truth, rank):
    """The probe of the last rank is NaN: all ranks leave it out, and the next one counts as ever."""
    surgery.patch_model(engine.model)
    config = surgery.SurgeryConfig(sinks=1, nonfinite="drop")
    regularizer = surgery.SurgeryRegularizer(engine.model, config)
    regularizer.backward(*nan_pair(rank))
    assert regularizer.report.dropped and regularizer.dropped == 1
    for number, ids in enumerate(task(rank)):
        engine.micro_step(ids, number == MICRO_BATCHES - 1)
    task_alone = worst_error(engine.gradients(), truth.task)
    engine.end_step()
    after = step(engine, regularizer, rank, truth, "per_rank", 1.0)
    assert regularizer.dropped == 1
    return [after[0], max(task_alone, after[1])]


def every_rank_raises(engine, rank):
    """A global divergence with a NaN in it stops all ranks, not only the one that has it."""
    surgery.patch_model(engine.model)
    regularizer = surgery.SurgeryRegularizer(engine.model, surgery.SurgeryConfig(sinks=1, divergence="global"))
    regularizer.backward(*nan_pair(rank))


def ranks_disagree_on_the_sink(engine, rank):
    """Sequences too short for the known sink, on one rank and step: all ranks search, or the engine would hang."""
    surgery.patch_model(engine.model)
    regularizer = surgery.SurgeryRegularizer(engine.model, surgery.SurgeryConfig(sink_refresh_steps=3))
    found, states = surgery.regularizer.find_sinks, []
    searches = []

    def find(model, batch):
        searches.append(len(states))
        real = found(model, batch)
        # as if the sink were the third token wherever there is one, on the first rank from the second search on
        return torch.where(batch.mask.sum(1) > 2, 0 if rank and len(searches) < 4 else 2, 0).to(real)

    surgery.regularizer.find_sinks = find
    try:
        for number in range(8):
            batches = pair(rank)
            if number == 5 and rank == 0:
                batches[0]["attention_mask"][0, 2:] = 0
            regularizer.backward(*batches)
            for micro, ids in enumerate(task(rank)):
                engine.micro_step(ids, micro == MICRO_BATCHES - 1, 0.0)
            engine.end_step()
            states.append(regularizer.state_dict()["sink_position"])
    finally:
        surgery.regularizer.find_sinks = found
    return {"searched": searches, "known": states}


def broken(make, rank):
    """The text of the error when something cuts the graph below the second layer."""
    engine = make()
    surgery.patch_model(engine.model)
    layer = unwrap(engine.model).model.layers[1]
    forward = layer.forward
    layer.forward = lambda hidden, *args, **kwargs: forward(hidden.detach(), *args, **kwargs)
    regularizer = surgery.SurgeryRegularizer(engine.model, surgery.SurgeryConfig(sinks=1))
    regularizer.backward(*pair(rank))


def attempt(function, *arguments):
    try:
        return function(*arguments)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"


def main(name, output):
    rank, ranks = start_group()
    engine_class = ENGINES[name]
    overrides = {"vocab_size": 98} if name == "tp" else {}
    results = {}

    def maker(lora, checkpointing):
        if name == "tp":
            return lambda: engine_class(engine_class.build("model", lora, checkpointing))
        return lambda: engine_class(build(lora, checkpointing))

    # PEFT 0.21 does not split adapters along transformers' plan (test_tensor_parallel)
    for lora in (False, True)[: 1 if name == "tp" else 2]:
        truth = Truth(lora, 1 if name == "tp" else ranks, **overrides)
        data_rank = 0 if name == "tp" else rank
        for checkpointing in CHECKPOINTING:
            modes = ("per_rank",) if checkpointing != "off" else ("per_rank", "global-chunks") if lora else MODES
            for mode in modes:
                key = f"{'lora' if lora else 'full'}, {checkpointing}, {mode}"
                results[key] = attempt(cell, maker(lora, checkpointing), truth, data_rank, mode)
        results[f"{'lora' if lora else 'full'}: what a mistake would show as"] = truth.difference()
        if name == "fsdp2-bf16":
            low = Truth(lora, ranks, torch.bfloat16)
            floors = [
                worst_error(low.penalty(divergence, rank)[1], truth.penalty(divergence, rank)[1])
                for divergence in ("per_rank", "global")
            ]
            results[f"{'lora' if lora else 'full'}: bf16 noise floor"] = max(floors)
    if name not in ("tp", "fsdp2-bf16"):
        truth = Truth(False, ranks)
        results["NaN on one rank"] = attempt(one_rank_has_nan, engine_class(with_nan_token(build())), truth, rank)
        results["NaN, global"] = attempt(every_rank_raises, engine_class(with_nan_token(build())), rank)
        results["sinks"] = attempt(ranks_disagree_on_the_sink, engine_class(build()), rank)
    if name.startswith("zero"):
        results["call"] = attempt(call_an_engine, engine_class(build()), rank)
    if name == "tp":
        results["lora"] = attempt(cell, maker(True, "off"), truth, 0, "per_rank")
    results["broken"] = attempt(broken, maker(False, "off"), data_rank)
    with open(output, "w", encoding="utf-8") as file:
        json.dump(results, file, indent=1)
    dist.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
