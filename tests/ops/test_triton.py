"""The Triton kernels against fp64 autograd: in the interpreter without a GPU, compiled with one."""

import math
from unittest import mock

import pytest
import surgery_kernels as sk
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triton_cases import ALL_STATS, DEVICE, Case, check, interpreter, launcher, run  # noqa: F401

pytest.importorskip("triton")
from surgery_kernels.backends.triton import configs

TileConfig = configs.TileConfig


def small_tiles(block_m, block_n):
    return mock.patch.object(configs, "INTERPRETER", TileConfig(block_m, block_n, 4, 1))


@pytest.mark.parametrize("length", [1, 17, 63, 100])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_lengths(length, causal):
    check(Case(length, length, causal=causal))


@pytest.mark.parametrize("len_q, len_k", [(1, 100), (17, 63), (63, 17), (5, 1)])
def test_lengths_differ(len_q, len_k):
    check(Case(len_q, len_k, sinks=1))


@pytest.mark.parametrize("n_heads, n_kv", [(2, 2), (4, 2), (3, 1)], ids=["mha", "gqa", "mqa"])
def test_head_groups(n_heads, n_kv):
    check(Case(40, 40, batch=2, n_heads=n_heads, n_kv=n_kv))


@pytest.mark.parametrize("head_dim", [8, 16, 20, 32, 40, 64, 72, 80, 96, 112, 128, 192, 256])
def test_head_dims(head_dim):
    check(Case(20, 20, head_dim=head_dim))


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("head_dim", [16, 80])
def test_low_precision(dtype, head_dim):
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("the interpreter multiplies bfloat16 wrongly")
    check(Case(50, 50, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("which", range(5), ids=["out", "lse", *ALL_STATS])
def test_backward_of_one_output(which):
    """Each output's gradient alone; the others arrive as None."""
    check(Case(40, 40, softcap=3.0), which=[which])


@pytest.mark.parametrize("stats", [(), ("sink_mass",), ("max_logit", "sink_mass"), ("entropy",)], ids=str)
def test_subsets_of_statistics(stats):
    check(Case(40, 40, stats=stats))


@pytest.mark.parametrize("window_size", [(0, 0), (5, -1), (7, 9), (-1, 3), (40, 2)], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_windows(window_size, causal):
    check(Case(70, 70, window_size=window_size, causal=causal))


def test_window_and_lengths_differ():
    check(Case(30, 75, window_size=(12, 4), causal=False))


def test_window_skips_blocks():
    """Keys outside every row's window are never read: nan there changes nothing."""
    case = Case(16, 200, window_size=(20, 0), stats=("sink_mass",))
    q, k, v = case.qkv()
    k[:, :100] = math.nan
    v[:, :100] = math.nan
    outputs, (dq, _, _) = run(case, (q, k, v))
    assert all(x.isfinite().all() for x in (*outputs, dq))


@pytest.mark.parametrize("softcap", [0.5, 20.0])
def test_softcap(softcap):
    check(Case(40, 40, softcap=softcap))


@pytest.mark.parametrize("softmax_scale", [-0.3, 0.0, 2.0])
def test_scales(softmax_scale):
    stats = ("sink_mass", "entropy") if softmax_scale == 0.0 else ALL_STATS
    check(Case(40, 40, softmax_scale=softmax_scale, stats=stats))


@pytest.mark.parametrize("sinks", [0, 3, 16, 33], ids=str)
def test_first_keys_as_sinks(sinks):
    check(Case(40, 40, sinks=sinks))


def test_sink_positions():
    """Anywhere, in any order, twice the same (it counts once), outside the padded sequence."""
    sinks = ((3, 3, 39, 0), (17, 1, 16, 18))
    check(Case(40, 40, batch=2, sinks=sinks))
    check(Case(40, 40, batch=2, sinks=sinks, leftpad_k=(4, 30), seqused_k=(38, 40), seqused_q=(38, 40)))


def test_sink_positions_in_the_middle():
    """Blocks between full ones, apart from each other, and in a window that not every row still has."""
    check(Case(150, 150, batch=2, sinks=((70, 71), (20, 100)), stats=("sink_mass",)))
    check(Case(150, 150, sinks=((70,),), window_size=(60, 0), stats=("sink_mass",)))


def test_sixteen_sink_positions():
    check(Case(40, 40, sinks=(tuple(range(0, 32, 2)),)))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_padding_on_both_sides(causal):
    """leftpad beyond a block, an all-padding sequence, rows that see nothing."""
    check(
        Case(
            40,
            40,
            batch=3,
            causal=causal,
            leftpad_k=(3, 21, 40),
            seqused_q=(40, 35, 40),
            seqused_k=(40, 37, 40),
            sinks=2,
        )
    )


def test_more_rows_than_keys():
    """Bottom-right causal with Tq > Tk: the first rows see nothing."""
    check(Case(50, 20, n_heads=4, n_kv=2))


def test_padded_keys_may_be_nan():
    case = Case(40, 40, batch=1, leftpad_k=(5,), seqused_k=(30,), seqused_q=(30,), stats=("sink_mass",))
    q, k, v = case.qkv()
    for x in (k, v):
        x[:, 30:] = math.nan
    outputs, grads = run(case, (q, k, v))
    assert all(x[x != -math.inf].isfinite().all() for x in (*outputs, *grads))


LENGTHS = ((17, 17), (0, 0), (5, 30), (33, 33), (0, 4), (3, 0), (1, 1))


@pytest.mark.parametrize("options", [{}, {"window_size": (6, -1)}, {"causal": False, "sinks": 3}], ids=str)
def test_packed(options):
    """Empty sequences, one-sided ones, Tq != Tk."""
    check(Case(lengths=LENGTHS, n_heads=4, n_kv=2, **options))


def test_packed_sink_positions():
    check(Case(lengths=((17, 17), (20, 20)), sinks=((2, 16), (0, 7))))


@pytest.mark.parametrize("layout", ["heads_first", "sliced", "channels_apart"])
def test_strides(layout):
    case = Case(40, 40, batch=2, n_heads=4, n_kv=2)

    def restride(x):
        if layout == "heads_first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "sliced":
            return torch.cat([x, x], -1)[..., : x.shape[-1]]
        return x.transpose(-1, -3).contiguous().transpose(-1, -3)

    check(case, qkv=[restride(x) for x in case.qkv()])


def test_expanded_gradients():
    """out.sum() and rows.mean() send gradients of stride 0."""
    case = Case(40, 40, batch=2)
    qkv = [x.requires_grad_() for x in case.qkv()]
    got = case.call(*qkv)
    grads = torch.autograd.grad(got.out.sum() + got.stats["sink_mass"].mean(), qkv)
    wide = [x.detach().double().requires_grad_() for x in qkv]
    out, _, sink_mass, *_ = case.truth(*wide)
    expected = torch.autograd.grad(out.sum() + sink_mass.mean(), wide)
    for actual, truth in zip(grads, expected, strict=True):
        torch.testing.assert_close(actual.double(), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", ["left", "more_rows"])
def test_nan_in_rows_that_see_nothing(padding):
    """nan * 0: neither q nor the gradient of such a row may reach anything, dk and dv least of all."""
    options = {"leftpad_k": (30,)} if padding == "left" else {"len_k": 20}
    case = Case(50, **({"len_k": 50} | options))
    q, k, v = case.qkv()
    q[:, :30] = math.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    got = case.call(*leaves)
    outputs = (got.out, got.lse, *got.stats.values())
    weights = [torch.ones_like(x) for x in outputs]
    weights[0][:, :30] = math.nan
    for x in weights[1:]:
        x[..., :30] = math.nan
    grads = torch.autograd.grad(outputs, leaves, weights)
    assert all(x.isfinite().all() for x in grads)
    assert all(x[x != -math.inf].isfinite().all() for x in outputs)


def test_gradients_of_blind_rows_are_dropped():
    """inf * 0: a row that sees no key must not carry an infinite gradient into dk."""
    case = Case(50, 20, stats=("sink_mass",))
    qkv = [x.requires_grad_() for x in case.qkv()]
    got = case.call(*qkv)
    weight = torch.ones_like(got.lse)
    weight[..., :30] = math.inf
    grads = torch.autograd.grad((got.out, got.stats["sink_mass"]), qkv, (torch.ones_like(got.out), weight))
    assert all(x.isfinite().all() for x in grads)


def test_max_logit_ties_share():
    case = Case(40, 40, stats=("max_logit",), causal=False)
    q, k, v = case.qkv()
    k[:, 1::3] = k[:, 1:2]
    check(case, which=[2], qkv=(q, k, v))


def test_max_logit_of_saturated_softcap():
    """tanh reaches 1 in fp32 for several keys: they tie."""
    case = Case(30, 30, stats=("max_logit",), softcap=0.01, causal=False)
    outputs, (dq, dk, _) = run(case, case.qkv(), which=[0, 2])
    assert all(x.isfinite().all() for x in (*outputs, dq, dk))


@pytest.mark.parametrize("shape", [(0, 8, 8), (2, 0, 8), (2, 8, 0)], ids=["no_batch", "no_rows", "no_keys"])
def test_empty_inputs(shape):
    batch, len_q, len_k = shape
    q = torch.randn(batch, len_q, 2, 16, device=DEVICE, requires_grad=True)
    k = torch.randn(batch, len_k, 1, 16, device=DEVICE, requires_grad=True)
    got = sk.flash_attn_stats(q, k, k, backend="triton", stats=ALL_STATS)
    (got.out.sum() + got.stats["sink_mass"].sum()).backward()
    assert (got.out == 0).all() and (got.lse == -math.inf).all()
    assert (q.grad == 0).all() and (k.grad == 0).all()


def test_backward_repeats_bitwise():
    case = Case(70, 70, n_heads=4, n_kv=2)
    qkv = case.qkv()
    _, first = run(case, qkv)
    _, second = run(case, qkv)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def single_pass(monkeypatch):
    monkeypatch.setenv("SURGERY_BACKWARD", "single_pass")


@pytest.mark.parametrize(
    "case",
    [
        Case(70, 70, batch=2, n_heads=4, n_kv=2, sinks=((60, 3), (17, 0))),
        Case(40, 40, batch=3, leftpad_k=(3, 21, 40), seqused_q=(40, 35, 40), seqused_k=(40, 37, 40), sinks=2),
        Case(30, 75, window_size=(12, 4), causal=False, softcap=3.0, head_dim=24),
        Case(50, 20, head_dim=80, softmax_scale=-0.3),
        Case(lengths=((17, 17), (0, 0), (5, 30), (33, 33), (0, 4), (3, 0)), n_heads=4, n_kv=2),
        Case(50, 50, dtype=torch.float16),
    ],
    ids=["gqa", "padded", "window", "chunks", "packed", "half"],
)
def test_single_pass_backward(single_pass, case):
    check(case)


def test_single_pass_with_nan_in_padding(single_pass):
    """dq sums over keys, so padded ones must be kept out of the products, not only out of dk and dv."""
    case = Case(40, 40, batch=1, leftpad_k=(5,), seqused_k=(30,), seqused_q=(30,), stats=("sink_mass",))
    q, k, v = case.qkv()
    clean = run(case, (q, k, v))[1]
    for x in (k, v):
        x[:, 30:] = math.nan
        x[:, :5] = math.nan
    for actual, expected in zip(run(case, (q, k, v))[1], clean, strict=True):
        torch.testing.assert_close(actual, expected)


def test_single_pass_is_chosen_by_name_or_measurement(monkeypatch):
    inputs = sk.make_inputs(*Case(9, 9).qkv())
    assert not launcher.wants_single_pass(inputs)
    monkeypatch.setenv("SURGERY_BACKWARD", "single_pass")
    assert launcher.wants_single_pass(inputs)
    with pytest.raises(ValueError, match="up to 128, got 160"):
        launcher.wants_single_pass(sk.make_inputs(*Case(9, 9, head_dim=160).qkv()))
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(ValueError, match="no fixed order"):
            launcher.wants_single_pass(inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setenv("SURGERY_BACKWARD", "fast")
    with pytest.raises(ValueError, match="'fast'"):
        launcher.wants_single_pass(inputs)
    monkeypatch.setattr(configs, "SINGLE_PASS", {90: {64}})
    assert configs.single_pass_wins((9, 0), 64, 2)
    assert not any((configs.single_pass_wins((9, 0), 128, 2), configs.single_pass_wins((9, 0), 64, 4)))


def test_heads_split_between_programs():
    """A program a query head and a sum afterwards gives what the loop over the group gives."""
    with mock.patch.object(launcher, "head_splits", lambda inputs, config: 4):
        check(Case(40, 40, n_heads=8, n_kv=2, batch=2))
        check(Case(lengths=LENGTHS, n_heads=4, n_kv=1))


def test_operator_registration():
    case = Case(9, 9)
    q, k, v = (x.requires_grad_() for x in case.qkv())

    def call(q, k, v):
        got = sk.flash_attn_stats(q, k, v, backend="triton")
        return got.out.sum() + got.stats["sink_mass"].sum() + got.lse.sum()

    eager = torch.autograd.grad(call(q, k, v), (q, k, v))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(q, k, v), (q, k, v)), eager, strict=True):
        torch.testing.assert_close(a, b)


def test_auto_compiles_without_a_graph_break():
    """The choice of a backend asks the device; torch.compile must not trace that."""
    q = torch.randn(1, 9, 2, 16, device=DEVICE)
    call = torch.compile(lambda q: sk.flash_attn_stats(q, q, q).out, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(call(q), sk.flash_attn_stats(q, q, q).out)


def reasons(q, **options):
    k = q[..., :1, :]
    return sk.BACKENDS["triton"].unsupported_reasons(sk.make_inputs(q, k, k, **options))


def test_unsupported_reasons(monkeypatch):
    q = torch.randn(1, 20, 2, 16)
    assert "float64" in reasons(q.double())[0]
    assert "head_dim" in reasons(torch.randn(1, 20, 2, 260))[0]
    assert "16 sink positions" in reasons(q, sinks=torch.arange(17, dtype=torch.int32)[None])[0]
    assert reasons(q, sinks=20) == [] or DEVICE == "cuda"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "bfloat16" in reasons(q.bfloat16())[0]
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "NVIDIA" in reasons(q)[0]
    with pytest.raises(ValueError, match="NVIDIA"):
        sk.flash_attn_stats(q, q, q, backend="triton")


def test_auto_prefers_cpu_on_cpu():
    q = torch.randn(1, 20, 2, 16)
    assert sk.choose_backend(sk.make_inputs(q, q, q)) == "cpu"


@st.composite
def cases(draw):
    """Small problems over every option at once."""
    packed = draw(st.booleans())
    # few heads: a program takes the interpreter 20 ms
    batch, n_heads, n_kv = draw(st.sampled_from([(1, 1, 1), (1, 2, 1), (1, 2, 2), (2, 1, 1), (2, 2, 1)]))
    length = st.integers(0 if packed else 1, 20 if batch == 2 else 34)
    lengths = tuple((draw(length), draw(length)) for _ in range(batch)) if packed else ()
    len_q, len_k = (1, 1) if packed else (draw(length), draw(length))
    causal = draw(st.booleans())
    window = st.one_of(st.just(-1), st.integers(0, 20))
    options = {}
    if not packed and draw(st.booleans()):
        options["leftpad_k"] = tuple(draw(st.integers(0, len_k)) for _ in range(batch))
        options["seqused_k"] = tuple(draw(st.integers(first, len_k)) for first in options["leftpad_k"])
        options["seqused_q"] = tuple(draw(st.integers(0, len_q)) for _ in range(batch))
    longest = max((k for _, k in lengths), default=len_k)
    if longest and draw(st.booleans()):
        n = draw(st.integers(1, 4))
        position = st.integers(0, longest - 1)
        options["sinks"] = tuple(tuple(draw(position) for _ in range(n)) for _ in range(batch))
    else:
        options["sinks"] = draw(st.integers(0, min(longest, 5)))
    return Case(
        len_q,
        len_k,
        batch,
        n_heads,
        n_kv,
        draw(st.sampled_from([8, 16, 24, 48])),
        lengths=lengths,
        causal=causal,
        window_size=(draw(window), draw(window)),
        softcap=draw(st.sampled_from([0.0, 0.0, 4.0])),
        stats=tuple(name for name in ALL_STATS if draw(st.booleans())),
        seed=draw(st.integers(0, 2**16)),
        **options,
    )


@settings(
    # on a device every other set of flags is a compilation of seconds
    max_examples=300 if DEVICE == "cpu" else 40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(case=cases(), tiles=st.sampled_from([(16, 16), (32, 16), (16, 32)]), which=st.integers(0, 7))
def test_random_problems(case, tiles, which):
    # one output alone in half of the cases
    chosen = [which] if which < 2 + len(case.stats) else None
    with small_tiles(*tiles):
        check(case, which=chosen)
