"""Run the cells that the results do not hold yet, then write the table and the figures.

    OMP_NUM_THREADS=1 python -m bench.defence --data DATA --output RUNS --jobs 2
    python -m bench.defence --recipe paper --data DATA --output RUNS --results results/defence      (a GPU)

DATA holds the files named in splits.py. RUNS holds models and answers and must stay out of the repository; the results
folder holds ids and numbers. A killed command goes on where it stopped: with the cells that the results lack.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from surgery.run_files import git_commit, versions, write_json

from . import figures
from .cell import RESULT
from .grid import RECIPES, cells
from .splits import split
from .table import append_cell, association, read_cells, table_rows, write_table

RESULTS = Path(__file__).parents[1] / "results" / "cpu" / "defence"


def main(argv=None):
    arguments = parser().parse_args(argv)
    if not arguments.table:
        run(arguments)
    rows = table_rows(read_cells(arguments.results))
    if not rows:
        raise SystemExit(f"{arguments.results} holds no cell yet")
    print(write_table(rows, Path(arguments.results, "table.csv")))
    associated = association(read_cells(arguments.results))
    if associated:
        print(write_table(associated, Path(arguments.results, "association.csv")))
    for path in figures.draw(read_cells(arguments.results), rows, Path(arguments.results)):
        print(path)
    return 0


def parser():
    it = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    it.add_argument("--data", help="folder of the data files")
    it.add_argument("--output", help="folder of runs, outside the repository")
    it.add_argument("--model", default="demo", help="folder or id of the chat model (default: SmolLM2-135M-Instruct)")
    it.add_argument("--results", default=RESULTS, help="folder of the results (default: results/cpu/defence)")
    it.add_argument("--recipe", default="cpu", choices=RECIPES, help="(default: cpu)")
    it.add_argument("--seeds", type=int, default=3, help="(default: 3)")
    it.add_argument("--jobs", type=int, default=1, help="cells at a time, each in a process of its own (default: 1)")
    it.add_argument("--only", default="", help="cells whose key holds this text")
    it.add_argument("--minutes", type=float, help="start no cell after so many minutes")
    it.add_argument("--list", action="store_true", help="name the cells that are missing, and stop")
    it.add_argument("--table", action="store_true", help="only the table and the figures, from the results")
    return it


def run(arguments):
    """Run the missing cells."""
    recipe = RECIPES[arguments.recipe]
    done = {result["key"] for result in read_cells(arguments.results)}
    missing = [one for one in cells(arguments.seeds) if one.key not in done and arguments.only in one.key]
    if arguments.list:
        print("\n".join(one.key for one in missing))
        raise SystemExit
    if not arguments.data or not arguments.output:
        raise SystemExit("--data and --output are needed to run cells")
    output = Path(arguments.output).resolve()
    paths = {
        "parts": str(output / "parts"),
        "data": arguments.data,
        "chat": arguments.model,
        "aligned": str(output / "aligned" / "model"),
    }
    prepare(recipe, paths, output)
    Path(arguments.results).mkdir(parents=True, exist_ok=True)
    write_json(
        Path(arguments.results, "recipe.json"),
        {"recipe": asdict(recipe), "versions": versions(), "git_commit": git_commit(), "jobs": arguments.jobs},
    )
    started = time.monotonic()
    numbers = itertools.count(len(done) + 1)

    def one(cell):
        if arguments.minutes and time.monotonic() - started > 60 * arguments.minutes:
            return
        folder = output / "cells" / cell.key.replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        call = json.dumps([cell.to_dict(), asdict(recipe), paths | {"folder": str(folder)}])
        code = 0
        # a cell may have outlived the command that started it
        if not (folder / RESULT).is_file():
            with open(folder / "log.txt", "w") as log:
                process = [sys.executable, "-m", "bench.defence.cell", call]
                code = subprocess.run(process, stdout=log, stderr=log).returncode
        if code:
            print(f"{cell.key}: failed, see {folder / 'log.txt'}", flush=True)
            return
        append_cell(arguments.results, json.loads((folder / RESULT).read_text(encoding="utf-8")))
        print(f"{next(numbers):3d}  {cell.key}  {time.monotonic() - began:.0f} s", flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(one, missing))


def prepare(recipe, paths, output):
    """Split the data, and make the aligned start."""
    from surgery.finetune import TrainConfig, run_training
    from surgery.models import load_model

    split(paths["data"], paths["parts"], load_model(paths["chat"])[1], recipe)
    if Path(paths["aligned"]).is_dir():
        return
    parts, folder = Path(paths["parts"]), output / "aligning"
    # of a run that was cut off
    shutil.rmtree(folder, ignore_errors=True)
    train = TrainConfig(
        model=paths["chat"],
        data=str(parts / "align.jsonl"),
        harmful=str(parts / "probe_harmful.jsonl"),
        refusal=str(parts / "probe_refusal.jsonl"),
        output=str(folder),
        steps=recipe.align_steps,
        batch_size=recipe.align_batch,
        learning_rate=recipe.align_learning_rate,
        max_length=recipe.max_length,
        save_every=10**6,
        defence="plain",
    )
    run_training(train, None)
    folder.rename(output / "aligned")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
