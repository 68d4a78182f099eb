"""Probes split along the sequence over 2 and 3 processes, against one process (context.py)."""

import pytest
from ranks import run_ranks


def check(results, cells):
    for rank in results:
        # every rank has the whole sequences' values, and after the sum the whole gradient
        assert len(rank["errors"]) == cells
        bad = {key: found for key, found in rank["errors"].items() if not max(found) <= 1e-5}
        assert not bad
        assert all(difference <= 1e-6 and agrees for difference, agrees in rank["values"].values())


@pytest.mark.slow
@pytest.mark.parametrize("style", ("ring", "ulysses"))
def test_split_over_two(style, tmp_path):
    results = run_ranks("context.py", style, folder=tmp_path)
    check(results, 12)
    for rank in results:
        ours, eager = rank["bf16"]
        assert 0 < ours <= 2 * eager
        refused = rank["refusals"]
        assert "must all be given the same batches" in refused["different batches"]
        assert "split already" in refused["nested"]
        assert "style must be one of ring, ulysses, got 'zigzag'" in refused["style"]
        if style == "ring":
            assert "does not know sliding windows" in refused["window"]
            assert "not 'reference'" in refused["reference"]
        else:
            assert "ulysses needs heads that 2 ranks divide" in refused["heads"]


@pytest.mark.slow
def test_ring_of_three(tmp_path):
    """13 tokens on 3 ranks: padding up to 15, and a rank on which some sequences have no token."""
    check(run_ranks("context.py", "ring", folder=tmp_path, ranks=3), 5)
