"""bench.estimate_table: a row of the table, and its CSV."""

import csv

from bench.estimate_table import main


def test_a_row_and_its_csv(tmp_path, capsys):
    table = tmp_path / "estimate.csv"
    assert main(["--models", "smollm2-135m", "--settings", "LoRA 16, checkpointing", "--csv", str(table)]) == 0
    assert "| smollm2-135m | LoRA 16, checkpointing |" in capsys.readouterr().out
    with open(table, newline="", encoding="utf-8") as file:
        lines = {line["method"]: line for line in csv.DictReader(file)}
    assert set(lines) == {"plain", "surgery", "paper"}
    totals = {method: int(line["total_bytes"]) for method, line in lines.items()}
    assert int(lines["surgery"]["over_plain_bytes"]) == totals["surgery"] - totals["plain"] < 1e6
    assert totals["paper"] > totals["plain"] > 2 * 135e6
