"""column_mass: the sum over rows of the fp64 probabilities, for every mask feature."""

import pytest
import surgery_kernels as sk
import torch
from oracle import Case, int32, qkv, visible_and_sinks

CASES = [
    Case("causal"),
    Case("full", causal=False),
    Case("H4/1", heads=(4, 1)),
    Case("H4/4", heads=(4, 4)),
    Case("B1-T300-causal", batch=1, len_q=300, len_k=300),
    Case("B1-Tq257-Tk100", batch=1, len_q=257, len_k=100),
    Case("Tq5-Tk19", len_q=5, len_k=19),
    Case("Tq19-Tk5", len_q=19, len_k=5),
    Case("leftpad", leftpad=(0, 6)),
    Case("rightpad", used_q=(17, 6), used_k=(17, 6)),
    Case("rightpad-full", used_q=(17, 6), used_k=(17, 6), causal=False),
    Case("bothpads", leftpad=(3, 4), used_q=(17, 9), used_k=(17, 9)),
    Case("no-real-key", leftpad=(0, 17), causal=False),
    Case("window", window=(3, -1)),
    Case("window-full", window=(3, 2), causal=False),
    Case("window-bothpads", window=(3, -1), leftpad=(3, 4), used_q=(17, 9), used_k=(17, 9)),
    Case("seqused-differ-window", len_q=11, len_k=23, used_q=(7, 11), used_k=(23, 9), window=(4, 1), causal=False),
    Case("softcap", softcap=2.0),
    Case("scale", scale=0.9),
]


def truth(case, q, k):
    """[B, H, Tk] fp64."""
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    k = k.double().repeat_interleave(case.heads[0] // case.heads[1], 2)
    s = torch.einsum("bihd,bjhd->bhij", q.double(), k) * scale
    s = case.softcap * torch.tanh(s / case.softcap) if case.softcap else s
    visible = torch.stack([visible_and_sinks(case, b)[0] for b in range(case.batch)])[:, None]
    # the softmax of a row that sees nothing is nan
    return torch.softmax(s.masked_fill(~visible, float("-inf")), -1).nan_to_num(0.0).sum(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_column_mass_is_the_sum_of_probabilities(case, dtype):
    inputs = sk.make_inputs(*(x.detach() for x in qkv(case, dtype)), **case.options())
    _, lse, _ = sk.attn_forward(inputs, sk.choose_backend(inputs))
    mass = sk.column_mass(inputs, lse)
    assert mass.dtype == torch.float32
    torch.testing.assert_close(mass.double(), truth(case, inputs.q, inputs.k), rtol=2e-4, atol=1e-5)
    rows = (lse != float("-inf")).sum(-1)
    torch.testing.assert_close(mass.sum(-1), rows.float(), rtol=2e-4, atol=1e-5)


def test_argmax_finds_the_sink():
    q, k, v = (x.detach().clone() for x in qkv(Case("T63", len_q=63, len_k=63), torch.float32))
    q[..., 0] = 4.0
    k[..., 0] = 0.0
    k[0, 0, :, 0], k[1, 9, :, 0] = 8.0, 8.0
    inputs = sk.make_inputs(q, k, v, leftpad_k=int32([0, 7]))
    result = sk.flash_attn_stats(q, k, v, leftpad_k=int32([0, 7]), sinks=int32([[0], [2]]))
    mass = sk.column_mass(inputs, result.lse)
    assert mass.argmax(-1).tolist() == [[0] * 4, [9] * 4]
    sink = torch.stack([mass[0, :, 0], mass[1, :, 9]])
    torch.testing.assert_close(sink, result.stats["sink_mass"].sum(-1), rtol=1e-4, atol=1e-5)


def test_column_mass_has_no_gradient_and_ignores_autocast():
    q, k, v = qkv(Case("T17"), torch.float32)
    lse = sk.flash_attn_stats(q, k, v).lse
    plain = sk.column_mass(sk.make_inputs(q, k, v), lse)
    inputs = sk.make_inputs(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        cast = sk.column_mass(inputs, lse)
    assert not plain.requires_grad and torch.equal(plain, cast)


def test_packed_inputs_are_refused():
    q = torch.zeros(4, 2, 8)
    cu_seqlens = int32([0, 4])
    inputs = sk.make_inputs(q, q, q, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=4, max_seqlen_k=4)
    with pytest.raises(ValueError, match=r"takes dense inputs \[B, T, H, D\], got packed"):
        sk.column_mass(inputs, torch.zeros(2, 4))
