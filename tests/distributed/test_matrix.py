"""Every engine x {full, LoRA} x checkpointing x meaning of d, 2 processes, against single-process eager autograd.

One pair of processes an engine runs all its cells (matrix.py): starting one costs more than all its cells.
"""

import pytest
from ranks import run_ranks

EXACT = 1e-5


def check_exact(cells, gradient, value=EXACT):
    bad = {
        key: found
        for key, found in cells.items()
        if not all(isinstance(one, list) and one[0] <= value and one[1] <= gradient for one in found)
    }
    assert not bad


def cells_of(results):
    """{cell: what each rank wrote} of the cells that are compared with the truth."""
    return {key: [rank[key] for rank in results] for key in results[0] if key.count(", ") == 2}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ("ddp", "fsdp2", "zero2", "zero3"))
def test_gradients_equal_one_process(engine, tmp_path):
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    results = run_ranks("matrix.py", engine, folder=tmp_path)
    cells = cells_of(results)
    assert len(cells) == 7 + 4
    check_exact(cells, EXACT)
    for rank in results:
        # otherwise a cell would pass with the other meaning of d, or with the task's gradient missing
        for trained in ("full", "lora"):
            meanings, task = rank[f"{trained}: what a mistake would show as"]
            assert meanings > 0.1 and task > 100 * EXACT
        check_exact({"NaN on one rank": [rank["NaN on one rank"]]}, EXACT)
        assert rank["NaN, global"].startswith("NonFiniteStatistic")
        assert rank["sinks"] == {"searched": [0, 1, 2, 3, 5, 6], "known": [None, None, None, 2, 2, None, 2, 2]}
        assert "did not arrive in layers [0]" in rank["broken"]
        if engine.startswith("zero"):
            assert "call regularizer.backward(...) instead" in rank["call"]
    assert "another rank's probe" in results[0]["NaN, global"]


@pytest.mark.slow
def test_fsdp2_in_bf16_is_no_worse_than_eager(tmp_path):
    """Mixed precision: at most twice the error of single-process eager autograd with bf16 weights."""
    results = run_ranks("matrix.py", "fsdp2-bf16", folder=tmp_path)
    cells = cells_of(results)
    assert len(cells) == 7 + 4
    for trained in ("full", "lora"):
        floor = results[0][f"{trained}: bf16 noise floor"]
        assert 0 < floor < 0.3
        check_exact({key: found for key, found in cells.items() if key.startswith(trained)}, 2 * floor, 0.1)
    assert all("did not arrive in layers [0]" in rank["broken"] for rank in results)


@pytest.mark.slow
def test_tensor_parallel(tmp_path):
    """Heads split over ranks by transformers' plan; both ranks hold the same batch."""
    results = run_ranks("matrix.py", "tp", folder=tmp_path)
    cells = cells_of(results)
    assert len(cells) == 7
    check_exact(cells, EXACT)
    for rank in results:
        assert "did not arrive in layers [0]" in rank["broken"]
        # should a release split adapters along the plan, the matrix gets its LoRA cells
        assert rank["lora"].startswith("ValueError: adapters with tensor parallel")
