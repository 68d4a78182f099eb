"""One rank of test_defence_ranks.py: the defences of surgery/baselines on a tiny model, Lisa also resumed.

    python defence_run.py FOLDER RESULT

The same global batches on any number of ranks. Writes {run: [loss of each step]}; the models lie in the working folder.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from ranks import start_group

from surgery.finetune import TrainConfig, run_training
from surgery.run_files import UNMEASURED

SEQUENCES, STEPS = 4, 4
# the last checkpoint but one lies in the middle of a state
OPTIONS = {
    "lisa": {"lisa_alignment_steps": 2, "lisa_task_steps": 3, "lisa_rho": 30.0, "save_every": 3},
    "constrained": {"save_every": 100},
}


def main(folder, output):
    rank, ranks = start_group()
    losses = {}

    def train(defence, resume=False):
        files = {name: str(Path(folder, f"{name}.jsonl")) for name in ("data", "harmful", "refusal")}
        config = TrainConfig(
            model=str(Path(folder, "model")),
            **{**files, **OPTIONS[defence], "output": defence, "defence": defence, "resume": resume},
            steps=STEPS,
            batch_size=SEQUENCES // ranks,
            accumulation=2,
            learning_rate=1e-3,
            bf16=False,
            log_every=1,
        )
        trainer = run_training(config, None, progress=False)
        return [line["loss"] for line in trainer.state.log_history if "loss" in line]

    for defence in OPTIONS:
        losses[defence] = train(defence)
    if rank == 0:
        # as a kill during the last step leaves it
        Path("lisa", f"checkpoint-{STEPS}", UNMEASURED).unlink()
    if ranks > 1:
        dist.barrier()
    losses["resumed"] = train("lisa", resume=True)
    with open(output, "w", encoding="utf-8") as file:
        json.dump(losses, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
