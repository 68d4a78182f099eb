"""The keywords of transformers' mask functions, in the form of every version, and torch's kernel of every version."""

import pytest
import surgery_kernels as sk
import torch

from surgery.attention import surgery_mask
from surgery.versions import query_rows

CAUSAL = {"mask_function": lambda batch, head, query, key: key <= query}


def keywords(form, length, offset):
    """What transformers passes for `length` queries from `offset` on: before 5.4 (old) and since."""
    if form == "old":
        return {"cache_position": torch.arange(offset, offset + length)}
    return {"q_length": length, "q_offset": offset, "device": torch.device("cpu")}


@pytest.mark.parametrize("form", ("old", "new"))
@pytest.mark.parametrize(
    ("length", "offset", "kv_length", "whole"), ((5, 0, 5, True), (5, 0, 9, False), (1, 8, 9, False), (1, 0, 1, True))
)
def test_query_rows(form, length, offset, kv_length, whole):
    found = query_rows(kv_length, 0, keywords(form, length, offset))
    assert found == (length, torch.device("cpu"), whole)


@pytest.mark.parametrize("form", ("old", "new"))
def test_a_sliding_cache_is_never_the_whole(form):
    """As many keys as queries, but the keys begin later: only possible behind a cache."""
    assert not query_rows(1, 7, keywords(form, 1, 7))[2]


@pytest.mark.parametrize("form", ("old", "new"))
def test_surgery_mask(form):
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    whole = {"batch_size": 2, "kv_length": 5, **CAUSAL, **keywords(form, 5, 0)}
    assert surgery_mask(attention_mask=mask, **whole).tolist() == [[[[0, 5]]], [[[0, 3]]]]
    assert surgery_mask(**whole) is None
    # position_ids that restart at 2 in both rows
    whole["mask_function"] = lambda batch, head, query, key: (key <= query) & ((query < 2) == (key < 2))
    assert surgery_mask(allow_is_causal_skip=False, **whole).flatten().tolist() == [0, 2, 5, 7, 10]


def _transformers_form():
    import inspect

    from transformers.masking_utils import sdpa_mask

    return "old" if "cache_position" in inspect.signature(sdpa_mask).parameters else "new"


def test_surgery_mask_behind_a_cache():
    """The installed version's own form reaches transformers' mask function whole."""
    options = {"batch_size": 1, "kv_length": 9, **CAUSAL, **keywords(_transformers_form(), 3, 4)}
    found = surgery_mask(attention_mask=torch.ones(1, 9, dtype=torch.bool), allow_is_causal_skip=False, **options)
    expected = torch.arange(9)[None, :] <= torch.arange(4, 7)[:, None]
    assert torch.equal(found, expected[None, None])


def test_grouped_heads_on_the_cpu():
    """Regression: before 2.9 torch's CPU kernel reads past the end of k and v that have fewer heads than q."""
    q, k, v = torch.randn(2, 7, 4, 16), torch.randn(2, 7, 2, 16), torch.randn(2, 7, 2, 16)
    ours, truth = (sk.flash_attn_stats(q, k, v, backend=backend) for backend in ("cpu", "reference"))
    torch.testing.assert_close(ours.out, truth.out)
