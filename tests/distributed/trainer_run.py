"""One rank of test_trainer_ranks.py: a SurgeryTrainer run on a tiny model.

    python trainer_run.py ENGINE LORA RESULT

Global divergence and the same global batches on any number of ranks, so that every engine must give the same losses.
Writes {"loss": [...], "grad_norm": [...], "penalty": [...]}, a value a step.
"""

import json
import os
import sys

from engines import build
from ranks import start_group
from tiny import rows, tiny_tokenizer
from transformers import DataCollatorForSeq2Seq, TrainingArguments

import surgery
from surgery.data import RowEncoder, task_examples
from surgery.run_files import read_history

SEQUENCES, PAIRS, STEPS = 4, 4, 5


def zero(stage):
    return {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "overlap_comm": False},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
    }


def main(engine, lora, output):
    on_gpus = engine == "fsdp2"
    # accelerate runs FSDP2 on GPUs only, and joins their group by itself
    ranks = int(os.environ["WORLD_SIZE"]) if on_gpus else start_group()[1]
    # before TrainingArguments: with ZeRO-3 they make transformers partition weights as they are created
    model = build(lora == "lora")
    arguments = TrainingArguments(
        "run",
        per_device_train_batch_size=SEQUENCES // ranks,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=1e-3,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=not on_gpus,
        **({"fsdp": "full_shard", "fsdp_config": {"fsdp_version": 2}} if on_gpus else {}),
        disable_tqdm=True,
        deepspeed=zero(int(engine[-1])) if engine.startswith("zero") else None,
    )
    tokenizer = tiny_tokenizer()
    trainer = surgery.SurgeryTrainer(
        model,
        arguments,
        train_dataset=task_examples(rows(48, seed=5), RowEncoder(tokenizer, 32)),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        surgery_config=surgery.SurgeryConfig(
            pairs_per_step=PAIRS // ranks, divergence="global", probe_chunk_size=PAIRS // ranks
        ),
        harmful=rows(9, seed=10, response_words=8),
        refusal=rows(7, seed=11, response_words=4),
    )
    trainer.train()
    logged = trainer.state.log_history
    result = {key: [line[key] for line in logged if key in line] for key in ("loss", "grad_norm")}
    # fully_shard makes a class of the model's own, FSDPLlamaForCausalLM
    result["engine"] = type(trainer.model_wrapped).__name__
    trainer.accelerator.wait_for_everyone()
    result["penalty"] = [line["penalty"] for line in read_history("run")]
    with open(output, "w", encoding="utf-8") as file:
        json.dump(result, file, default=float)


if __name__ == "__main__":
    main(*sys.argv[1:])
