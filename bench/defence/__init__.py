"""Does the defence work? Fine-tuning of SmolLM2-135M-Instruct on GSM8K with poisoned rows, with and without defences.

    python -m bench.defence --data DATA --output RUNS               every cell that results/ does not hold yet
    python -m bench.defence --table                                 table and figures from results/ alone

grid.py says which cells there are and how they train, cell.py makes one, table.py and figures.py read the results.
"""
