"""The column-mass kernel against the sum of the fp64 probabilities, and against the torch path."""

import math

import pytest
import surgery_kernels as sk
import torch
from triton_cases import DEVICE, interpreter  # noqa: F401

pytest.importorskip("triton")
from surgery_kernels.backends import triton as backend


def make(len_q, len_k, **options):
    generator = torch.Generator().manual_seed(len_q)
    q = torch.randn(2, len_q, 4, 16, generator=generator).to(DEVICE)
    k = torch.randn(2, len_k, 2, 16, generator=generator).to(DEVICE)
    return sk.make_inputs(q, k, k, **options)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(
    "len_q, len_k, options",
    [
        (63, 63, {}),
        (1, 40, {}),
        (40, 17, {}),
        (50, 50, {"causal": False}),
        (70, 70, {"window_size": (9, -1)}),
        (40, 40, {"softcap": 3.0}),
        (40, 40, {"softmax_scale": -0.5}),
        (40, 40, {"leftpad_k": int32(5, 20), "seqused_k": int32(40, 33), "seqused_q": int32(40, 33)}),
    ],
    ids=["causal", "one_row", "more_rows", "full", "window", "softcap", "negative_scale", "padding"],
)
def test_column_mass_matches_torch(len_q, len_k, options):
    inputs = make(len_q, len_k, **options)
    lse = sk.attn_forward(inputs, "reference")[1]
    mass = backend.column_mass(inputs, lse)
    expected = sk.column_mass(sk.AttnInputs(**{**vars(inputs), "q": inputs.q.cpu(), "k": inputs.k.cpu()}), lse.cpu())
    torch.testing.assert_close(mass.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_column_mass_sums_to_the_rows():
    """Every row that sees a key gives away exactly 1."""
    inputs = make(45, 30)
    lse = sk.attn_forward(inputs, "reference")[1]
    rows = (lse != -math.inf).sum(-1).float()
    torch.testing.assert_close(backend.column_mass(inputs, lse).sum(-1), rows)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_column_mass_takes_the_kernel_on_cuda(monkeypatch):
    calls = []
    monkeypatch.setattr(backend, "column_mass", lambda *args: calls.append(args))
    inputs = make(20, 20)
    sk.column_mass(inputs, sk.attn_forward(inputs, "reference")[1])
    assert calls
