"""The experiment: its splits, one whole cell of each kind on a tiny model, and the statistics of the table."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from tiny import rows, tiny_model, tiny_tokenizer

from bench.defence import __main__ as command
from bench.defence import cell as one_cell
from bench.defence import figures, gradients, splits, table
from bench.defence.grid import CORE, RECIPES, Cell, cells
from surgery.data import read_rows

TINY = replace(
    RECIPES["cpu"],
    rows=8,
    steps=2,
    batch_size=2,
    longest_task=40,
    max_length=40,
    probe_length=24,
    answer_tokens=3,
    losses=4,
    accuracy=2,
    task_tokens=4,
    align_steps=2,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data folder of random words, and a tiny chat model."""
    folder = tmp_path_factory.mktemp("data")
    counts = {"harmful_user_rows": 20, "beavertails_harmful": 620, "beavertails_safe": 320, "refusals": 1120}
    for seed, (name, count) in enumerate({**counts, "gsm8k_train": 30, "gsm8k_test": 10}.items()):
        found = rows(count, seed, response_words=5 if seed % 2 else 4)
        if name.startswith("gsm8k"):
            found = [{**row, "response": f"{row['response']} #### {i}"} for i, row in enumerate(found)]
        write(folder / f"{name}.jsonl", found)
    write(folder / "strongreject_prompts.jsonl", [{**row, "category": "x"} for row in rows(6, 7)])
    labels = [{**row, "type": "x", "label": ("safe", "unsafe")[i % 2]} for i, row in enumerate(rows(8, 8))]
    write(folder / "xstest_prompts.jsonl", labels)
    tiny_model(attention="sdpa").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    return folder


def write(path, found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found))


@pytest.fixture(scope="module")
def parts(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    splits.split(data, folder, tiny_tokenizer(), TINY)
    return folder


def test_splits_use_every_row_once(data, parts):
    found = {path.stem: read_rows(path) for path in parts.glob("*.jsonl")}
    assert set(found) == {"task", "task_test", "align", *(name for part in splits.SLICES.values() for name in part)}
    for names in splits.SLICES.values():
        texts = [json.dumps(row) for name in names for row in found[name]]
        source = [
            json.dumps(row)
            for row in read_rows(data / f"{next(k for k, v in splits.SLICES.items() if v is names)}.jsonl")
        ]
        assert len(texts) <= len(source)
        assert all(texts.count(text) <= source.count(text) for text in texts[:50])
    # seeds see other rows first
    orders = [read_rows(splits.shuffled(parts, seed) / "task.jsonl") for seed in (0, 1)]
    assert orders[0] != orders[1] and sorted(map(str, orders[0])) == sorted(map(str, orders[1]))
    # prompts that a split holds are not asked
    seen = {row["prompt"] for name in found for row in found[name]}
    sets = splits.prompt_sets(data, parts, 1)
    assert all(prompt.text not in seen for prompts in sets.values() for prompt in prompts)
    assert all(prompt.expect == "answer" for prompt in sets["xstest"])


@pytest.mark.parametrize(
    "cell",
    [
        Cell(defence="none", poison=0.0),
        Cell(defence="plain"),
        Cell(poison=0.25, seed=1),
        Cell(surgery={"preset": "upstream"}),
        Cell(defence="constrained"),
    ],
    ids=lambda cell: cell.method,
)
def test_a_cell_trains_and_is_evaluated(cell, data, parts, tmp_path, monkeypatch):
    paths = {"folder": str(tmp_path), "parts": str(parts), "data": str(data), "aligned": str(data / "model")}
    one_cell.main([json.dumps([cell.to_dict(), asdict(TINY), paths])])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["key"] == cell.key and not (tmp_path / "run").exists()
    prompts = result["prompts"]["strongreject"]
    assert len(result["refusal"]["strongreject"]) == len(result["incoherent"]["strongreject"]) == len(prompts) > 0
    assert len(result["correct"]) == TINY.accuracy
    assert all(np.isfinite(result[f"{name}_losses"]).all() for name in ("task", "harmful", "refusal"))
    if cell.defence == "none":
        assert "step_seconds" not in result
    else:
        assert len(result["train_losses"]) == len(result["positive_heads_by_step"]) == TINY.steps
        assert result["step_seconds"] > 0 and result["peak_bytes"] > 0 and 0 < result["changed_weights"] <= 1
    words = {word for row in rows(3, 7) for word in row["prompt"].split()}
    assert not any(word in json.dumps(result) for word in words)


def test_row_losses_are_the_models_own(data):
    from surgery.data import RowEncoder, task_examples

    model, tokenizer = tiny_model(attention="sdpa"), tiny_tokenizer()
    found = rows(5, 3, response_words=9)
    encoder = RowEncoder(tokenizer, 40)
    losses = one_cell.row_losses(model, tokenizer, found, encoder, batch_size=2)
    import torch

    for row, loss in zip(found, losses, strict=True):
        example = {k: torch.tensor([v]) for k, v in task_examples([row], encoder)[0].items()}
        with torch.no_grad(), one_cell.autocast():
            assert loss == pytest.approx(model(**example).loss.item(), abs=2e-2)


def test_cells_have_names_of_their_own_and_the_core_comes_first():
    found = list(cells(3))
    assert len({cell.key for cell in found}) == len(found)
    trained = [cell for cell in found if cell.defence != "none"]
    assert {cell.seed for cell in trained[: 3 * len(CORE)]} == {0, 1, 2}
    assert {cell.poison for cell in found if cell.method.startswith("surgery")} == {0.0, 0.05, 0.1, 0.2}


def fake(method, seed, refusal, loss, poison=0.1):
    defence = method.split()[0]
    surgery = {"lambda_sink": 30.0} if "30" in method else {}
    cell = Cell(defence=defence, poison=poison, seed=seed, surgery=surgery)
    n = len(refusal)
    text = "".join(map(str, refusal))
    return {
        "key": cell.key,
        **cell.to_dict(),
        "method": cell.method,
        "refusal": {"strongreject": text, "xstest": "0" * n},
        "incoherent": {"strongreject": "0" * (n - 1) + "1"},
        "correct": "10",
        **{f"{name}_losses": [loss] * n for name in ("task", "harmful", "refusal")},
        "divergence": {"positive_heads": 3, "significant_positive_heads": 1, "mean_relu_divergence": 0.1},
        "positive_heads_by_step": [3] * 9,
        "mean_relu_divergence_by_step": [0.1] * 9,
        "step_seconds": 1.0,
        "peak_bytes": 2**20,
    }


def test_differences_are_paired_by_prompt_and_seed():
    draw = np.random.default_rng(0)
    easy = draw.random(200)
    results = []
    for seed in range(3):
        base = draw.random(200)
        # prompts differ a lot, and the method refuses exactly those and a fifth more
        plain = (base < easy * 0.5).astype(int)
        more = (base < easy * 0.5 + 0.2).astype(int)
        results += [fake("plain", seed, plain, 1.0), fake("surgery", seed, more, 1.5)]
    found = {row["method"]: row for row in table.table_rows(results)}
    row = found["surgery lambda_sink=300"]
    assert row["seeds"] == 3 and "refusal_vs_plain" not in found["plain"]
    assert row["refusal_vs_plain"] == pytest.approx(row["refusal"] - found["plain"]["refusal"])
    # paired: the difference is known better than either rate
    width = row["refusal_vs_plain_high"] - row["refusal_vs_plain_low"]
    assert width < row["refusal_high"] - row["refusal_low"]
    assert 0.1 < row["refusal_vs_plain_low"] < row["refusal_vs_plain"] < row["refusal_vs_plain_high"] < 0.3
    assert row["task_loss_vs_plain_low"] == row["task_loss_vs_plain_high"] == pytest.approx(0.5)
    # the last answer of each is degenerate
    assert row["safe_and_coherent"] <= row["refusal"]


def test_a_run_at_another_rate_is_compared_with_plain_at_that_rate():
    results = [fake("plain", 0, [1, 1, 1, 1], 1.0), fake("surgery", 0, [0, 0, 1, 1], 2.0)]
    for base, loss in ((results[0], 1.5), (results[1], 1.75)):
        train = {"learning_rate": 1e-5}
        cell = Cell(defence=base["defence"], train=train)
        slow = {"train": train, "method": cell.method, "key": cell.key, "task_losses": [loss] * 4}
        results.append(base | slow)
    found = {row["method"]: row for row in table.table_rows(results)}
    assert found["surgery lambda_sink=300 learning_rate=1e-05"]["task_loss_vs_plain"] == 0.25
    assert found["surgery lambda_sink=300"]["task_loss_vs_plain"] == 1.0
    assert "task_loss_vs_plain" not in found["plain learning_rate=1e-05"]


def test_the_interval_covers_the_spread_of_seeds():
    results = [fake("plain", seed, [seed % 2] * 50, 1.0) for seed in range(4)]
    (row,) = table.table_rows(results)
    # every prompt of a seed agrees: all the doubt is between seeds
    assert row["refusal"] == 0.5 and row["refusal_low"] == 0 and row["refusal_high"] == 1


def test_a_cell_counted_twice_is_an_error():
    results = [fake("plain", 0, [0, 1], 1.0)] * 2
    with pytest.raises(ValueError, match="two results"):
        table.table_rows(results)


def test_association_leaves_out_cells_whose_divergence_was_trained():
    results = []
    for seed in range(6):
        plain, surgery = fake("plain", seed, [1] * seed + [0] * (6 - seed), 1.0), fake("surgery", seed, [0] * 6, 1.0)
        # more positive heads, fewer refusals
        plain["divergence"]["positive_heads"], surgery["divergence"]["positive_heads"] = 9 - seed, seed
        results += [plain, surgery]
    found = {row["cells"]: row for row in table.association(results) if row["divergence"] == "positive_heads"
             and row["safety"] == "refusal"}  # fmt: skip
    assert found["untouched"]["rho"] == pytest.approx(-1) and found["untouched"]["number"] == 6
    assert found["all"]["number"] == 12 and found["all"]["rho"] > -0.9


def test_command_skips_cells_that_are_there(tmp_path, capsys):
    for poison in (0.1, 0.2):
        for method in ("plain", "surgery", "surgery 30"):
            table.append_cell(tmp_path, fake(method, 0, [0, 1, 1], 1.0, poison))
    with pytest.raises(SystemExit):
        command.main(["--results", str(tmp_path), "--list", "--seeds", "1"])
    missing = capsys.readouterr().out.splitlines()
    assert "aligned p=0.1 plain seed=0" not in missing and "aligned p=0.05 plain seed=0" in missing
    command.main(["--results", str(tmp_path), "--table"])
    assert {path.name for path in tmp_path.iterdir()} == {
        table.CELLS, "table.csv", "association.csv", "poison.png", "lambda.png", "heads.png", "divergence.png"
    }  # fmt: skip


def test_figures_need_more_than_one_point(tmp_path):
    assert figures.by_lambda(table.table_rows([fake("plain", 0, [0, 1], 1.0)]), tmp_path) is None


def test_gradients_agree_for_equal_rows_only(data, parts, tmp_path):
    (tmp_path / "aligned").mkdir()
    (tmp_path / "aligned" / "model").symlink_to(data / "model")
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts" / "task.jsonl", read_rows(parts / "task.jsonl"))
    for equal in (True, False):
        for side, seed in (("harmful", 5), ("refusal", 6)):
            found = rows(40, seed, response_words=9)
            write(tmp_path / "parts" / f"probe_{side}.jsonl", [found[0]] * 40 if equal else found)
        task, few, more = gradients.gradient_rows(tmp_path, TINY, [1, 4], 2, many=16)
        assert task["what"] == "task" and task["norm"] > 0 and few["norm"] > 0
        for row in (few, more):
            assert (row["cosine_of_draws"] > 0.99) == (row["cosine_with_many"] > 0.99) == equal
    with pytest.raises(ValueError, match="disjoint draws need 96"):
        list(gradients.gradient_rows(tmp_path, TINY, [40], 2, many=16))


def test_a_gradient_is_that_of_the_penalty():
    import torch

    model = torch.nn.Linear(3, 1, bias=False)
    model.weight.grad = torch.tensor([[1.0, 2.0, 2.0]])
    found = gradients.take_gradient(model)
    assert found.norm() == 3 and model.weight.grad is None and gradients.cosine(found, 2 * found) == pytest.approx(1)
