"""Every row of STATS: its definition, its bounds, its gradient by finite differences, alone and together."""

import math

import pytest
import surgery_kernels as sk
import torch
from oracle import ALL_STATS, Case, grads_of, int32, qkv, visible_and_sinks

CPU_BACKENDS = [
    name
    for name, backend in sk.BACKENDS.items()
    if not backend.unsupported_reasons(sk.make_inputs(*(torch.zeros(1, 2, 1, 4),) * 3))
]
by_backend = pytest.mark.parametrize("backend", CPU_BACKENDS)
by_stat = pytest.mark.parametrize("name", ALL_STATS)

# written again here, from a row's visible scores alone: the hooks in stats/ are what is tested
DEFINITIONS = {
    "sink_mass": lambda s, is_sink: torch.softmax(s, -1)[..., is_sink].sum(-1),
    "entropy": lambda s, is_sink: torch.distributions.Categorical(logits=s).entropy(),
    "max_logit": lambda s, is_sink: s.max(-1).values,
}
PROBLEMS = [
    Case("causal", len_q=9, len_k=9),
    Case("padded-window", len_q=9, len_k=9, leftpad=(2, 0), used_q=(9, 6), used_k=(9, 6), window=(3, -1), sinks=2),
    Case("softcap-full", len_q=4, len_k=9, softcap=2.0, causal=False, sinks=((1, 4), (0, 0))),
]
by_problem = pytest.mark.parametrize("case", PROBLEMS, ids=lambda case: case.name)


def test_every_statistic_has_a_definition_here():
    assert set(DEFINITIONS) == set(sk.STATS)
    assert all(name == stat.name and stat.description for name, stat in sk.STATS.items())


@by_problem
@by_backend
@by_stat
def test_value_is_the_definition(name, backend, case):
    q, k, v = (x.detach() for x in qkv(case, torch.float64))
    rows = sk.flash_attn_stats(q, k, v, **case.options(), stats=(name,), backend=backend).stats[name]
    for b in range(case.batch):
        visible, is_sink = visible_and_sinks(case, b)
        for i in range(case.len_q):
            seen = visible[i]
            for h in range(4):
                want = torch.tensor(0.0, dtype=torch.float64)
                if seen.any():
                    s = k[b, seen, h // 2] @ q[b, i, h] * case.head_dim**-0.5
                    s = case.softcap * torch.tanh(s / case.softcap) if case.softcap else s
                    want = DEFINITIONS[name](s, is_sink[seen])
                torch.testing.assert_close(rows[b, h, i], want, rtol=1e-10, atol=1e-12)


@by_problem
@by_backend
@by_stat
def test_gradcheck(name, backend, case):
    tiny = Case("tiny", len_q=case.len_q, len_k=case.len_k, heads=(2, 1), head_dim=3)
    leaves = qkv(tiny, torch.float64)

    def rows(q, k, v):
        result = sk.flash_attn_stats(q, k, v, **case.options(), stats=(name,), backend=backend)
        return result.stats[name], result.out

    assert torch.autograd.gradcheck(rows, leaves, fast_mode=True)


@by_backend
def test_gradcheck_lse_every_entry(backend):
    """The slow mode: every entry of the Jacobian, not one random projection."""
    leaves = qkv(Case("tiny", batch=1, len_q=3, len_k=4, heads=(2, 1), head_dim=2), torch.float64)

    def outputs(q, k, v):
        result = sk.flash_attn_stats(q, k, v, stats=ALL_STATS, backend=backend)
        return (result.lse, *result.stats.values())

    assert torch.autograd.gradcheck(outputs, leaves)


@by_backend
@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 30.0], ids="scores-{}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_bounds_and_finiteness(backend, dtype, size):
    case = Case("bounds", len_q=33, len_k=33, leftpad=(0, 4), sinks=3)
    q, k, v = qkv(case, dtype)
    q = (q.detach() * size).requires_grad_()
    result = sk.flash_attn_stats(q, k, v, **case.options(), stats=ALL_STATS, backend=backend)
    n_keys = torch.stack([visible_and_sinks(case, b)[0].sum(-1) for b in range(2)])[:, None]
    mass, entropy, max_logit = (result.stats[name] for name in ("sink_mass", "entropy", "max_logit"))
    lse = result.lse.masked_fill(n_keys == 0, 0.0)
    # p = exp(s - lse) inherits the last digit of lse
    slack = 1e-6 + 4e-7 * lse.abs()
    most = n_keys.clamp(min=1).log()
    assert (mass >= 0).all() and (mass <= 1 + slack).all()
    assert (entropy >= -slack).all() and (entropy <= most + slack + 1e-5).all()
    assert (max_logit <= lse + slack).all() and (lse <= max_logit + most + slack).all()
    if size == 0.0:
        uniform = torch.where(n_keys > 0, n_keys.clamp(max=3) / n_keys.clamp(min=1), 0.0)
        torch.testing.assert_close(mass, uniform.expand_as(mass), rtol=1e-5, atol=1e-6)
    names = {"out": result.out, "lse": result.lse, **result.stats}
    for dx in grads_of(names, (q, k, v), {name: torch.ones_like(x) for name, x in names.items()}):
        assert dx.isfinite().all()


@by_backend
def test_entropy_of_a_peaked_row_keeps_its_digits(backend):
    """Regression: lse - sum p s cancels in fp32 where the scores are large and the entropy is small."""
    s = torch.tensor([0.0, -9.0, -10.0, -11.0], dtype=torch.float64) + 60.0
    q, k = torch.ones(1, 1, 1, 1), s.float().view(1, 4, 1, 1)
    rows = sk.flash_attn_stats(q, k, k, softmax_scale=1.0, stats=("entropy",), backend=backend).stats["entropy"]
    want = torch.distributions.Categorical(logits=s).entropy()
    torch.testing.assert_close(rows.double().view(()), want, rtol=0, atol=1e-5)


@by_backend
def test_max_logit_ties_share_the_gradient(backend):
    """Keys 1 and 3 attain the maximum of every row that sees both: each gets half."""
    q, k = torch.ones(1, 4, 1, 1, dtype=torch.float64), torch.tensor([1.0, 7.0, 2.0, 7.0], dtype=torch.float64)
    k = k.view(1, 4, 1, 1).requires_grad_()
    rows = sk.flash_attn_stats(q, k, k.detach(), softmax_scale=1.0, stats=("max_logit",), backend=backend).stats
    (dk,) = torch.autograd.grad(rows["max_logit"][0, 0], k, torch.tensor([1.0, 10.0, 100.0, 1000.0]).double())
    assert dk.view(4).tolist() == [1.0, 10.0 + 100.0 + 500.0, 0.0, 500.0]


def test_max_logit_survives_another_rounding_in_the_backward():
    """The backward finds the maximum among the scores it computed, not by equality with the forward's."""
    s = torch.tensor([[1.0, 3.0, 2.0], [4.0, 4.0, 0.0]])
    stored = torch.tensor([3.0, 4.0]) * (1 + 1e-6)
    ds = sk.STATS["max_logit"].ds(torch.tensor([1.0, 2.0]), s, stored)
    assert ds.tolist() == [[0.0, 1.0, 0.0], [1.0, 1.0, 0.0]]


@by_problem
@by_backend
def test_all_statistics_equal_each_alone(backend, case):
    leaves = qkv(case, torch.float64)
    together = sk.flash_attn_stats(*leaves, **case.options(), stats=ALL_STATS, backend=backend)
    weights = {name: torch.randn_like(rows) for name, rows in together.stats.items()}
    summed = [torch.zeros_like(x) for x in leaves]
    for name in ALL_STATS:
        alone = sk.flash_attn_stats(*leaves, **case.options(), stats=(name,), backend=backend)
        torch.testing.assert_close(alone.stats[name], together.stats[name], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(alone.out, together.out, rtol=1e-11, atol=1e-12)
        for total, dx in zip(summed, grads_of(alone.stats, leaves, {name: weights[name]}), strict=True):
            total += dx
    for total, dx in zip(summed, grads_of(together.stats, leaves, weights), strict=True):
        torch.testing.assert_close(dx, total, rtol=1e-9, atol=1e-11)


@by_backend
def test_sink_mass_of_all_keys_is_one_without_gradient(backend):
    leaves = qkv(Case("T17"), torch.float64)
    mass = sk.flash_attn_stats(*leaves, sinks=17, backend=backend).stats["sink_mass"]
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=1e-12, atol=0)
    for dx in torch.autograd.grad(mass, leaves, torch.randn_like(mass), materialize_grads=True):
        assert dx.abs().max() < 1e-12


@by_backend
def test_sink_mass_of_disjoint_sinks_adds_up(backend):
    q, k, v = qkv(Case("T17"), torch.float64)

    def mass(*positions):
        return sk.flash_attn_stats(q, k, v, sinks=int32([positions] * 2), backend=backend).stats["sink_mass"]

    torch.testing.assert_close(mass(2, 9), mass(2) + mass(9), rtol=1e-12, atol=0)


@by_backend
def test_shifting_all_scores_moves_lse_and_max_only(backend):
    """k + c u adds one constant to a row's scores when q . u is constant along the row, as it always is."""
    case = Case("T17")
    q, k, v = (x.detach() for x in qkv(case, torch.float64))
    moved = k + 0.3
    before, after = (sk.flash_attn_stats(q, x, v, stats=ALL_STATS, backend=backend) for x in (k, moved))
    shift = (q.sum(-1) * 0.3 / math.sqrt(case.head_dim)).transpose(1, 2)
    for name in ("sink_mass", "entropy"):
        torch.testing.assert_close(after.stats[name], before.stats[name], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(after.lse, before.lse + shift, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(after.stats["max_logit"], before.stats["max_logit"] + shift, rtol=1e-10, atol=1e-11)
