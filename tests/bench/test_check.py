"""Cases, their fp64 truth in blocks, and the rule that turns a wrong implementation red."""

import dataclasses

import pytest
import torch
from surgery_kernels.testing import attention_truth

from bench import check
from bench.check import Truth, attention_in_blocks, pick
from bench.implementations import IMPLEMENTATIONS
from bench.problem import LAYOUTS, arrange, make_problem, restore
from bench.runner import Runner
from bench.shapes import KINDS, SHAPES, Case, case_for

CASES = [Case("tiny", 40, batch=3, kind=kind, dtype="float32") for kind in KINDS]


def visible(case, length):
    """[T, T] bool from the description of the kinds."""
    row = torch.arange(length)[:, None]
    key = row.T
    seen = torch.ones(length, length, dtype=torch.bool) if case.kind == "full" else key <= row
    return seen & (key > row - 24) if case.kind == "window" else seen


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kind)
def test_pairs_are_counted(case):
    assert case.pairs() == sum(int(visible(case, length).sum()) for length in case.lengths)
    assert case.flops("forward") == 4 * 4 * 16 * case.pairs()
    assert case.flops("both") == case.flops("forward") + case.flops("backward")


def test_ragged_lengths():
    assert Case("tiny", 40, batch=5, kind="packed").lengths == (40, 20, 30, 10, 40)
    assert Case("tiny", 40, batch=3, kind="packed").starts == (0, 40, 60, 90)
    assert case_for("tiny", 512, tokens=16384).batch == 32
    assert case_for("tiny", 512, tokens=100).batch == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gpt5", 8), "unknown shape 'gpt5'; known: llama3-8b"),
        (("tiny", 0), "length must be at least 1, got 0"),
        (("tiny", 8, 0), "batch must be at least 1, got 0"),
        (("tiny", 8, 1, "sparse"), "unknown kind 'sparse'; known: causal"),
        (("tiny", 8, 1, "full", "float8"), "unknown dtype 'float8'"),
        (("llama3-8b", 8, 1, "window"), "no window; shapes with one: mistral-7b"),
    ],
)
def test_cases_reject(arguments, message):
    with pytest.raises(ValueError, match=message):
        Case(*arguments)


def test_shapes_are_grouped_heads():
    assert all(shape.heads % shape.kv_heads == 0 for shape in SHAPES.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_go_there_and_back(layout):
    x = torch.randn(2, 5, 3, 4)
    there = arrange(x, layout)
    assert tuple(there.shape) == ((2, 5, 3, 4) if layout == "bthd" else (2, 3, 5, 4))
    assert there.is_contiguous() == (layout != "bhtd_view")
    torch.testing.assert_close(restore(there, layout), x, rtol=0, atol=0)


def test_the_sink_is_strong():
    """A statistic of 1e-5 would pass any tolerance."""
    problem = make_problem(Case("tiny", 512, batch=2, dtype="float32"))
    for group in Truth(problem).groups:
        assert 0.1 < group.truth["sink_mass"][:, 1:].mean() < 0.9


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kind)
def test_truth_is_autograd_in_fp64(case, monkeypatch):
    """Against attention written out in surgery_kernels.testing, in blocks of a few rows."""
    monkeypatch.setattr(check, "BLOCK_ELEMENTS", 7 * 2 * 40)
    problem = make_problem(case, seed=5)
    truth = Truth(problem)
    assert len(truth.groups) == truth.total == len(case.lengths) * 2
    for group in truth.groups:
        q, k, v, dout, dsink_mass = (
            pick(case, name, getattr(problem, name).detach(), group.sequence, group.kv_head).double()
            for name in ("q", "k", "v", "dout", "dsink_mass")
        )
        q = q.transpose(0, 1).requires_grad_()
        k, v = (x[:, None].clone().requires_grad_() for x in (k, v))
        length = q.shape[0]
        out, lse, stats = attention_truth(
            q,
            k,
            v,
            scale=case.softmax_scale,
            visible=visible(case, length),
            is_sink=torch.arange(length) == 0,
        )
        of_out = torch.autograd.grad(out, (q, k, v), dout.transpose(0, 1), retain_graph=True)
        of_mass = torch.autograd.grad(stats["sink_mass"], (q, k), dsink_mass)
        wanted = {"out": out.transpose(0, 1), "lse": lse, "sink_mass": stats["sink_mass"]}
        wanted |= {"dq_of_out": of_out[0].transpose(0, 1), "dk_of_out": of_out[1][:, 0], "dv": of_out[2][:, 0]}
        wanted |= {"dq": (of_out[0] + of_mass[0]).transpose(0, 1), "dk": (of_out[1] + of_mass[1])[:, 0]}
        for name, value in wanted.items():
            torch.testing.assert_close(group.truth[name], value.detach(), rtol=1e-10, atol=1e-12, msg=name)
        s = torch.einsum("ihd,jd->hij", q, k[:, 0]) * case.softmax_scale
        p = torch.softmax(s.masked_fill(~visible(case, length), float("-inf")), -1)
        torch.testing.assert_close(group.truth["column_mass"], p.sum(1).detach(), rtol=1e-10, atol=1e-12)


def test_only_some_groups_of_a_large_problem_are_checked(monkeypatch):
    monkeypatch.setattr(check, "BUDGET", {"cpu": 3 * 2 * 24 * 16 * 40**2 * 2})
    truth = Truth(make_problem(Case("tiny", 40, batch=4, dtype="float32")))
    assert [(group.sequence, group.kv_head) for group in truth.groups] == [(0, 0), (2, 0), (3, 1)]
    assert check.spread([1, 2, 3], 1) == [3]
    with pytest.raises(ValueError, match="needs every head"):
        truth.errors({"column_mean": torch.zeros(4, 40)})


def right_results(case, backend="ours_cpu"):
    problem = make_problem(case)
    return Truth(problem), Runner(IMPLEMENTATIONS[backend], case, "cpu", [problem]).results()


def scaled(x):
    return x * 1.1


def one_element(x):
    x = x.clone()
    x.view(-1)[-1] += 0.1 * x.abs().max()
    return x


def not_a_number(x):
    x = x.clone()
    x.view(-1)[3] = float("nan")
    return x


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wrong", [scaled, one_element, not_a_number])
@pytest.mark.parametrize("name", ["out", "sink_mass", "lse", "dq", "dk", "dv"])
def test_a_wrong_result_is_over_the_limit(name, wrong, dtype):
    truth, results = right_results(Case("tiny", 48, batch=2, dtype=dtype))
    assert max(truth.errors(results).values()) <= 1.0
    errors = truth.errors(results | {name: wrong(results[name])})
    assert not errors[name] <= 1.0
    assert all(error <= 1.0 for other, error in errors.items() if other != name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_lost_statistic_gradient_is_caught(dtype):
    """What FlashAttention-2 and -3 do with a loss of their lse: right outputs, no error, wrong gradients."""
    case = Case("tiny", 48, batch=2, dtype=dtype)
    truth, results = right_results(case)
    _, without = right_results(case, "ours_cpu_off")
    errors = truth.errors(results | {name: without[name] for name in ("dq", "dk")})
    assert errors["dq"] > 3
    assert errors["dk"] > 3
    # and an implementation that claims no statistic is held to the gradients of out alone
    assert max(truth.errors(without).values()) <= 1.0
    assert truth.errors({name: results[name] for name in ("out", "dq")})["dq"] > 3


def test_low_precision_statistics_need_to_be_declared():
    """Attention maps in bf16 pass the 2x rule, not fp32 tolerances."""
    problem = make_problem(Case("tiny", 64, dtype="bfloat16"))
    truth, entry = Truth(problem), IMPLEMENTATIONS["eager"]
    results = Runner(entry, problem.case, "cpu", [problem]).results()
    assert not entry.exact_statistics
    assert truth.errors(results, exact_statistics=False)["sink_mass"] <= 1.0
    assert truth.errors(results, exact_statistics=True)["sink_mass"] > 1.0


def test_plain_pytorch_is_the_baseline():
    """The baseline's error is that of eager attention, so eager stands near half of what is allowed."""
    problem = make_problem(Case("tiny", 64, batch=2, dtype="bfloat16"))
    results = Runner(IMPLEMENTATIONS["eager"], problem.case, "cpu", [problem]).results()
    errors = Truth(problem).errors(results, exact_statistics=False)
    assert 0.2 < errors["out"] < 0.7
    exact = {name: value.float() for name, value in Truth(problem).groups[0].truth.items()}
    assert exact["out"].dtype == torch.float32


def test_blocks_do_not_change_the_result(monkeypatch):
    case = dataclasses.replace(CASES[2], length=50)
    problem = make_problem(case)
    arguments = [pick(case, n, getattr(problem, n).detach(), 1, 1) for n in ("q", "k", "v", "dout", "dsink_mass")]
    arguments += [case.softmax_scale, case.causal, case.left, torch.float64]
    whole = attention_in_blocks(*arguments)
    monkeypatch.setattr(check, "BLOCK_ELEMENTS", 1)
    for name, value in attention_in_blocks(*arguments).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-11, atol=1e-12)
