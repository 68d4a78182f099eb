"""The order of probe pairs over ranks and resumes, and probes that Trainer leaves out."""

import json

import pytest
from tiny import rows, tiny_model, tiny_tokenizer
from transformers import DataCollatorForSeq2Seq, TrainingArguments

import surgery
from surgery.data import ProbeData, RowEncoder, task_examples
from surgery.run_files import HISTORY, read_history

HARMFUL, REFUSAL = rows(9, seed=10, response_words=8), rows(7, seed=11, response_words=4)


def order(ranks, pairs, steps, resumed=None):
    """Row numbers in the order in which `ranks` ranks of `pairs` pairs use them."""
    config = surgery.SurgeryConfig(pairs_per_step=pairs)
    data = [ProbeData(HARMFUL, REFUSAL, tiny_tokenizer(), config, rank, ranks) for rank in range(ranks)]
    for one in data:
        if resumed:
            one.resume(*resumed)
    return {
        name: [i for step in steps for one in data for i in one.indices(name, step)] for name in ("harmful", "refusal")
    }


@pytest.mark.parametrize(("ranks", "pairs"), ((1, 4), (2, 2), (4, 1)))
def test_order_depends_on_the_pair_alone(ranks, pairs):
    whole = order(1, 4, range(6))
    assert order(ranks, pairs, range(6)) == whole
    # each pass over a side uses every row once
    assert sorted(whole["refusal"][:7]) == list(range(7))


@pytest.mark.parametrize(("ranks", "pairs"), ((1, 4), (4, 2), (3, 1)))
def test_resume_on_other_ranks_goes_on_behind_the_used_pairs(ranks, pairs):
    """Three steps of two ranks with two pairs use 12; whoever goes on begins with the thirteenth."""
    before = ProbeData(HARMFUL, REFUSAL, tiny_tokenizer(), surgery.SurgeryConfig(pairs_per_step=2), 0, 2)
    assert before.used(3) == 12
    whole = order(1, 1, range(12 + ranks * pairs * 4))
    found = order(ranks, pairs, range(3, 7), resumed=(3, before.used(3)))
    assert found == {name: numbers[12:] for name, numbers in whole.items()}


def trainer(folder, **options):
    """A run in which one of four harmful rows has a token whose embedding is NaN."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(attention="sdpa")
    unknown = tokenizer.unk_token_id
    model.model.embed_tokens.weight.data[unknown] = float("nan")
    harmful = [*HARMFUL[:3], {"prompt": "w1 w2", "response": "unheard w4 w5"}]
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        max_steps=8,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return surgery.SurgeryTrainer(
        model,
        arguments,
        train_dataset=task_examples(rows(24, seed=5), RowEncoder(tokenizer, 32)),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        surgery_config=surgery.SurgeryConfig(pairs_per_step=1, **options),
        harmful=harmful,
        refusal=REFUSAL,
    )


def test_dropped_probes_are_counted_in_log_and_history(tmp_path):
    run = trainer(tmp_path, nonfinite="drop")
    run.train()
    # two passes over four rows
    whole = [json.loads(line) for line in (tmp_path / HISTORY).read_text().splitlines()]
    dropped = [line["step"] for line in whole if "dropped" in line]
    assert len(whole) == 8 and len(dropped) == 2
    assert read_history(tmp_path, dropped=True) == whole
    assert [line["step"] for line in read_history(tmp_path)] == [s for s in range(1, 9) if s not in dropped]
    logged = {line["step"]: line for line in run.state.log_history if "surgery/dropped" in line}
    assert [logged[step]["surgery/dropped"] for step in sorted(logged)] == [
        sum(step <= now for step in dropped) for now in range(1, 9)
    ]
    assert all(("surgery/penalty" in line) == (step not in dropped) for step, line in logged.items())
    weights = [p for name, p in run.model.named_parameters() if "embed_tokens" not in name]
    assert all(p.isfinite().all() for p in weights)
    assert run.surgery.regularizer.dropped == 2


def test_nonfinite_probe_stops_the_run_by_default(tmp_path):
    with pytest.raises(RuntimeError, match="activations on the probe are NaN"):
        trainer(tmp_path).train()
