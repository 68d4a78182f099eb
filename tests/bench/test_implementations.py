"""The table of implementations: each that can run here is right, and the GPU peers' wrappers on stand-ins."""

import itertools
import sys
import types

import pytest
import torch
import torch.nn.attention.flex_attention as flex_module
from torch.nn.attention import SDPBackend

from bench.check import Truth
from bench.implementations import IMPLEMENTATIONS, columns, flash_attention, flex, sdpa, v_augmentation
from bench.implementations.eager import additive_mask
from bench.implementations.types import Implementation, installed, limits
from bench.problem import make_problem
from bench.runner import Runner
from bench.shapes import KINDS, Case

HERE = [entry for entry in IMPLEMENTATIONS.values() if not entry.unsupported_reasons(Case("tiny", 8), "cpu")]


def worst(entry, case):
    """(largest error over the allowed one, name of the result, names of all results)."""
    problem = make_problem(case)
    results = Runner(entry, case, "cpu", [problem]).results()
    errors = Truth(problem).errors(results, entry.factor, entry.exact_statistics)
    name = max(errors, key=errors.get)
    return errors[name], name, set(errors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entry", HERE, ids=lambda entry: entry.name)
def test_right_wherever_it_claims_to_run(entry, kind, dtype):
    case = Case("tiny", 70, batch=3, kind=kind, dtype=dtype)
    reasons = entry.unsupported_reasons(case, "cpu")
    if reasons:
        assert kind in reasons[0]
        return
    error, name, names = worst(entry, case)
    assert error <= 1.0, f"{name}: {error}"
    if entry.task == "attention":
        assert names >= {"out", "dq", "dk", "dv"}


def test_the_table_knows_every_peer_and_says_why_it_cannot_run():
    for name in ("flex", "fa4", "fa3_fwd", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "vaug_cudnn", "flash_colsum"):
        reasons = IMPLEMENTATIONS[name].unsupported_reasons(Case("tiny", 8), "cpu")
        assert any("runs on cuda, got cpu" in reason for reason in reasons), name
    assert {"ours_cpu", "ours_triton", "paper", "eager", "sdpa", "vaug", "ours_columns"} <= set(IMPLEMENTATIONS)
    assert len({id(entry) for entry in IMPLEMENTATIONS.values()}) == len(IMPLEMENTATIONS)


def test_limits():
    reasons = limits(devices=("cuda",), kinds=("full",), dtypes=("float16",), package="no_such_package.inner")
    assert reasons(Case("tiny", 8), "cpu") == [
        "runs on cuda, got cpu",
        "solves full, got causal",
        "takes float16, got bfloat16",
        "no_such_package.inner is not installed",
    ]
    assert limits()(Case("tiny", 8), "cpu") == []
    assert installed("torch.nn")


@pytest.mark.parametrize("kind", KINDS)
def test_flex(kind, monkeypatch):
    """torch refuses its backward on a CPU for want of a kernel; the mathematics behind the refusal is complete."""
    monkeypatch.setattr(flex_module, "_validate_device", lambda *tensors: None)
    entry = Implementation("flex", "", limits(), flex.attention_of, "bhtd")
    for case in (Case("tiny", 70, batch=3, kind=kind, dtype="float32"), Case("tiny", 33, kind=kind, dtype="float32")):
        error, name, names = worst(entry, case)
        assert error <= 1.0, f"{name}: {error}"
        assert "sink_mass" in names


def heads_last_attention(q, k, v, causal, left, scale):
    """out and differentiable lse from [B, T, H, D], in plain torch: what the stand-ins below compute."""
    group = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(group, 1) for x in (k, v))
    s = (q @ k.transpose(-1, -2)).float() * scale
    row = torch.arange(q.shape[2])[:, None]
    behind = row - row.T
    hidden = behind < 0 if causal else torch.zeros_like(behind, dtype=torch.bool)
    if left is not None:
        hidden = hidden | (behind > left)
    s = s.masked_fill(hidden, float("-inf"))
    return (torch.softmax(s, -1).to(q.dtype) @ v).transpose(1, 2), torch.logsumexp(s, -1)


def fa4_func(q, k, v, *, softmax_scale=None, causal=False, window_size=(None, None), return_lse=False):
    """The part of flash-attn-4's signature that we use; its lse has a gradient only with return_lse."""
    assert window_size in ((None, None), (23, 0))
    out, lse = heads_last_attention(q, k, v, causal, window_size[0], softmax_scale)
    return out, lse if return_lse else lse.detach()


def fa4_varlen_func(
    q,
    k,
    v,
    *,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    softmax_scale=None,
    causal=False,
    return_lse=False,
):
    assert cu_seqlens_q.dtype == torch.int32
    starts = cu_seqlens_q.tolist()
    assert max_seqlen_q == max_seqlen_k == max(b - a for a, b in itertools.pairwise(starts))
    parts = [
        fa4_func(*(x[None, a:b] for x in (q, k, v)), softmax_scale=softmax_scale, causal=causal, return_lse=return_lse)
        for a, b in itertools.pairwise(starts)
    ]
    return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], -1)


def fa3_func(q, k, v, softmax_scale=None, causal=False, return_attn_probs=False):
    out, lse = heads_last_attention(q, k, v, causal, None, softmax_scale)
    return (out, lse) if return_attn_probs else out


def stand_in(monkeypatch, name, **functions):
    """A module `name` (and its parents) with these functions."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
    for key, function in functions.items():
        setattr(sys.modules[name], key, function)


@pytest.mark.parametrize("kind", ["causal", "full", "window", "packed"])
def test_fa4(kind, monkeypatch):
    stand_in(monkeypatch, "flash_attn.cute.interface", flash_attn_func=fa4_func, flash_attn_varlen_func=fa4_varlen_func)
    entry = Implementation("fa4", "", limits(), flash_attention._fa4, "bthd")
    error, name, names = worst(entry, Case("tiny", 70, batch=3, kind=kind, dtype="float32"))
    assert error <= 1.0, f"{name}: {error}"
    assert names == {"out", "lse", "sink_mass", "dq", "dk", "dv"}


def test_fa4_without_its_lse_gradient_is_caught(monkeypatch):
    def func(*args, return_lse, **kwargs):
        return fa4_func(*args, return_lse=False, **kwargs)

    stand_in(monkeypatch, "flash_attn.cute.interface", flash_attn_func=func, flash_attn_varlen_func=None)
    entry = Implementation("fa4", "", limits(), flash_attention._fa4, "bthd", factor=IMPLEMENTATIONS["fa4"].factor)
    assert worst(entry, Case("tiny", 70, batch=2, dtype="bfloat16"))[0] > 1.0


@pytest.mark.parametrize("kind", ["causal", "full"])
def test_fa3_forward(kind, monkeypatch):
    stand_in(monkeypatch, "fa3_fwd_interface", flash_attn_func=fa3_func)
    entry = Implementation("fa3_fwd", "", limits(), flash_attention._fa3, "bthd", backward=False)
    error, name, names = worst(entry, Case("tiny", 70, batch=2, kind=kind, dtype="float32"))
    assert error <= 1.0, f"{name}: {error}"
    assert names == {"out", "lse", "sink_mass"}


def colsum(query, key, scale=None, is_causal=False):
    """flash-colsum's result in plain torch: the mean over heads and rows, fp16; causal for one sequence only."""
    assert query.shape == key.shape
    assert not is_causal or len(query) == 1
    s = query.float() @ key.float().transpose(-1, -2) * scale
    if is_causal:
        s = s.masked_fill(torch.ones_like(s[0, 0], dtype=torch.bool).triu(1), float("-inf"))
    return torch.softmax(s, -1).mean((1, 2)).half()


@pytest.mark.parametrize("kind", ["causal", "full"])
def test_flash_colsum(kind, monkeypatch):
    stand_in(monkeypatch, "flash_colsum", flash_colsum=colsum)
    entry = Implementation("", "", limits(), columns._flash_colsum, "bhtd", "column_mass", backward=False)
    case = Case("tiny", 70, batch=2, kind=kind, dtype="bfloat16")
    error, _, names = worst(entry, case)
    assert error <= 1.0
    assert names == {"column_mean"}
    # its causal kernel reads the first 64 channels of a head only: such a result is red
    stand_in(monkeypatch, "flash_colsum", flash_colsum=lambda q, k, **kwargs: colsum(q[..., :8], k[..., :8], **kwargs))
    assert worst(entry, case)[0] > 1.0


def test_v_augmentation_with_a_larger_value(monkeypatch):
    """cuDNN and the efficient kernel take v with more channels than q: only v grows."""
    entry = Implementation(
        "", "", limits(), v_augmentation._build(None, grow_all=False), "bhtd_view", exact_statistics=False
    )
    seen = []
    attend = sdpa.attend

    def spy(q, k, v, *rest):
        seen.append((q.shape[-1], k.shape[-1], v.shape[-1]))
        return attend(q, k, v, *rest)

    monkeypatch.setattr(sdpa, "attend", spy)
    assert worst(entry, Case("tiny", 70, batch=2, dtype="float32"))[0] <= 1.0
    assert seen == [(16, 16, 24)]


def test_kernels_without_groups_get_repeated_heads(monkeypatch):
    seen = []

    def attention(q, k, v, is_causal, scale, enable_gqa):
        seen.append((k.shape[1], v.shape[1], enable_gqa))
        return q

    monkeypatch.setattr(sdpa.F, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(sdpa, "can_use_cudnn_attention", lambda params: params.enable_gqa and False)
    q, k = torch.zeros(1, 4, 5, 16), torch.zeros(1, 2, 5, 16)
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        sdpa._build(backend)(Case("tiny", 5), "cpu")(q, k, k)
    assert seen == [(2, 2, True), (4, 4, False), (4, 4, False)]


def test_eager_masks_are_made_once_and_hide_what_they_should():
    assert additive_mask(Case("tiny", 5, kind="full"), "cpu") is None
    mask = additive_mask(Case("tiny", 30, batch=2, kind="padded", dtype="float32"), "cpu")
    assert mask.shape == (2, 1, 30, 30)
    assert (mask[1, 0, :, 15:] < -1e38).all()
    assert (mask[0, 0].tril() == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_flex_is_one_graph(kind, monkeypatch):
    """On a GPU it is compiled with fullgraph=True; everything of that but Inductor runs here."""
    monkeypatch.setattr(flex_module, "_validate_device", lambda *tensors: None)

    def build(case, device):
        options = {"backend": "aot_eager", "dynamic": False, "fullgraph": True}
        return torch.compile(flex.attention_of(case, device), **options)

    entry = Implementation("flex", "", limits(), build, "bhtd")
    error, name, _ = worst(entry, Case("tiny", 40, batch=2, kind=kind, dtype="float32"))
    assert error <= 1.0, f"{name}: {error}"


@pytest.mark.parametrize("kind", ["causal", "window"])
def test_the_gathered_column_is_one_graph(kind, monkeypatch):
    gather = torch.compile(flash_attention.sink_mass_heads_last, backend="aot_eager", dynamic=False, fullgraph=True)
    monkeypatch.setattr(flash_attention, "_gather", lambda device: gather)
    stand_in(monkeypatch, "flash_attn.cute.interface", flash_attn_func=fa4_func, flash_attn_varlen_func=None)
    entry = Implementation("fa4", "", limits(), flash_attention._fa4, "bthd")
    assert worst(entry, Case("tiny", 70, batch=2, kind=kind, dtype="float32"))[0] <= 1.0
