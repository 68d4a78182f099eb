"""Every ValueError of the public functions says what was got and what is allowed."""

import logging
from dataclasses import replace

import pytest
import surgery_kernels as sk
import torch
from oracle import int32
from surgery_kernels import backends

Q = torch.zeros(2, 6, 4, 8)
KV = torch.zeros(2, 6, 2, 8)

# id: (arguments of flash_attn_stats changed, the message)
DENSE = {
    "q-not-a-tensor": ({"q": [1.0]}, r"q must be a tensor, got list"),
    "k-not-a-tensor": ({"k": None}, r"k must be a tensor, got NoneType"),
    "q-3d": ({"q": Q[0]}, r"q must be \[B, T, H, D\], got shape \(6, 4, 8\)"),
    "v-5d": ({"v": KV[None]}, r"v must be \[B, T, H, D\], got shape \(1, 2, 6, 2, 8\)"),
    "q-integer": ({"q": Q.int()}, r"q must be one of .*torch\.bfloat16.*, got torch\.int32"),
    "k-other-dtype": ({"k": KV.half()}, r"k must be torch\.float32 on cpu as q, got torch\.float16 on cpu"),
    "v-other-device": ({"v": KV.to("meta")}, r"v must be torch\.float32 on cpu as q, got torch\.float32 on meta"),
    "v-other-shape": ({"v": KV[:, :5]}, r"k and v must have one shape, got \(2, 6, 2, 8\) and \(2, 5, 2, 8\)"),
    "head-dims-differ": ({"q": Q[..., :4]}, r"must share a head dim of at least 1, got 4 and 8"),
    "head-dim-0": ({"q": Q[..., :0], "k": KV[..., :0], "v": KV[..., :0]}, r"head dim of at least 1, got 0 and 0"),
    "heads-not-a-multiple": ({"q": Q[:, :, :3]}, r"heads of q must be a multiple of those of k, got 3 and 2"),
    "no-key-heads": ({"k": KV[:, :, :0], "v": KV[:, :, :0]}, r"must be a multiple of those of k, got 4 and 0"),
    "no-query-heads": ({"q": Q[:, :, :0]}, r"must be a multiple of those of k, got 0 and 2"),
    "batches-differ": ({"q": Q[:1]}, r"q and k must have one batch size, got 1 and 2"),
    "leftpad-list": ({"leftpad_k": [0, 1]}, r"leftpad_k must be int32 \[2\], got \[0, 1\]"),
    "leftpad-int64": ({"leftpad_k": torch.zeros(2).long()}, r"leftpad_k must be int32 \[2\], got \(2,\) torch\.int64"),
    "seqused_q-shape": ({"seqused_q": int32([6])}, r"seqused_q must be int32 \[2\], got \(1,\) torch\.int32"),
    "seqused_k-2d": ({"seqused_k": int32([[6, 6]])}, r"seqused_k must be int32 \[2\], got \(1, 2\) torch\.int32"),
    "seqused_k-device": ({"seqused_k": int32([6, 6]).to("meta")}, r"seqused_k must be on cpu as q, got meta"),
    "leftpad-negative": ({"leftpad_k": int32([0, -1])}, r"leftpad_k must lie in \[0, 6\], got -1 to 0"),
    "seqused_q-too-long": ({"seqused_q": int32([7, 6])}, r"seqused_q must lie in \[0, 6\], got 6 to 7"),
    "seqused_k-too-long": ({"seqused_k": int32([6, 9])}, r"seqused_k must lie in \[0, 6\], got 6 to 9"),
    "sinks-too-many": ({"sinks": 7}, r"sinks must be in \[0, 6\], the longest sequence of keys, got 7"),
    "sinks-negative": ({"sinks": -1}, r"sinks must be in \[0, 6\], the longest sequence of keys, got -1"),
    "sinks-float": ({"sinks": 1.0}, r"sinks must be an int or an int32 tensor \[2, n\], got 1\.0"),
    "sinks-bool": ({"sinks": True}, r"sinks must be an int or an int32 tensor \[2, n\], got True"),
    "sinks-list": ({"sinks": [0]}, r"sinks must be an int or an int32 tensor \[2, n\], got \[0\]"),
    "positions-int64": ({"sinks": torch.zeros(2, 1).long()}, r"or int32 \[2, n\], got \(2, 1\) torch\.int64"),
    "positions-1d": ({"sinks": int32([0, 1])}, r"sinks must be an int or int32 \[2, n\], got \(2,\) torch\.int32"),
    "positions-batch": ({"sinks": int32([[0]])}, r"sinks must be an int or int32 \[2, n\], got \(1, 1\) torch\.int32"),
    "positions-device": ({"sinks": int32([[0], [0]]).to("meta")}, r"sinks must be on cpu as q, got meta"),
    "positions-too-far": ({"sinks": int32([[0], [6]])}, r"sinks must lie in \[0, 6\), got 0 to 6"),
    "positions-negative": ({"sinks": int32([[-2], [3]])}, r"sinks must lie in \[0, 6\), got -2 to 3"),
    "scale-infinite": ({"softmax_scale": float("inf")}, r"softmax_scale must be finite, got inf"),
    "scale-nan": ({"softmax_scale": float("nan")}, r"softmax_scale must be finite, got nan"),
    "softcap-negative": ({"softcap": -1.0}, r"softcap must be 0 \(off\) or positive, got -1\.0"),
    "softcap-nan": ({"softcap": float("nan")}, r"softcap must be 0 \(off\) or positive, got nan"),
    "softcap-infinite": ({"softcap": float("inf")}, r"softcap must be 0 \(off\) or positive, got inf"),
    "window-int": ({"window_size": 4}, r"window_size must be two ints \(left, right\), -1 is unbounded, got 4"),
    "window-one": ({"window_size": (4,)}, r"window_size must be two ints \(left, right\).*, got \(4,\)"),
    "window-three": ({"window_size": (4, 4, 4)}, r"window_size must be two ints \(left, right\).*, got \(4, 4, 4\)"),
    "window-None": ({"window_size": (None, 0)}, r"window_size must be two ints \(left, right\).*, got \(None, 0\)"),
    "window-fraction": ({"window_size": (1.5, 0)}, r"window_size must be two ints \(left, right\).*, got \(1\.5, 0\)"),
    "window-left-negative": ({"window_size": (-2, 0)}, r"window_size must be >= -1 on both sides, got \(-2, 0\)"),
    "window-right-negative": ({"window_size": (0, -2)}, r"window_size must be >= -1 on both sides, got \(0, -2\)"),
    "stats-string": ({"stats": "sink_mass"}, r"tuple of names, got the string 'sink_mass'; write \('sink_mass',\)"),
    "stats-unknown": ({"stats": ("sinkmass",)}, r"names out of \('sink_mass', 'entropy', 'max_logit'\), got \('sinkm"),
    "stats-twice": ({"stats": ("entropy", "entropy")}, r"must be distinct names .*, got \('entropy', 'entropy'\)"),
    "backend-unknown": ({"backend": "fa9"}, r"unknown backend 'fa9'; known: 'auto', .*'cpu'.*'reference'"),
}  # fmt: skip

PACKED_Q, PACKED_KV, STARTS = Q[0], KV[0], int32([0, 2, 6])
# id: (arguments of flash_attn_stats_varlen changed, the message)
PACKED = {
    "q-4d": ({"q": Q}, r"q must be \[total, H, D\], got shape \(2, 6, 4, 8\)"),
    "cu_seqlens_q-missing": ({"cu_seqlens_q": None}, r"cu_seqlens_q must be int32 \[N \+ 1\], got None"),
    "cu_seqlens_k-missing": ({"cu_seqlens_k": None}, r"cu_seqlens_k must be int32 \[N \+ 1\], got None"),
    "cu_seqlens-list": ({"cu_seqlens_k": [0, 2, 6]}, r"cu_seqlens_k must be int32 \[N \+ 1\], got \[0, 2, 6\]"),
    "cu_seqlens-int64": ({"cu_seqlens_q": STARTS.long()}, r"int32 \[N \+ 1\], got \(3,\) torch\.int64"),
    "cu_seqlens-2d": ({"cu_seqlens_q": STARTS[None]}, r"int32 \[N \+ 1\], got \(1, 3\) torch\.int32"),
    "cu_seqlens-nothing": (
        {"cu_seqlens_q": STARTS[:0], "cu_seqlens_k": STARTS[:0]},
        r"cu_seqlens_q must be int32 \[N \+ 1\], got \(0,\) torch\.int32",
    ),
    "cu_seqlens-device": ({"cu_seqlens_q": STARTS.to("meta")}, r"cu_seqlens_q must be on cpu as q, got meta"),
    "cu_seqlens-lengths": ({"cu_seqlens_k": int32([0, 6])}, r"cu_seqlens_k must have one length, got 3 and 2"),
    "cu_seqlens-start": ({"cu_seqlens_q": int32([1, 2, 6])}, r"cu_seqlens_q must rise from 0 to 6, got \[1, 2, 6\]"),
    "cu_seqlens-end": ({"cu_seqlens_k": int32([0, 2, 5])}, r"cu_seqlens_k must rise from 0 to 6, got \[0, 2, 5\]"),
    "cu_seqlens-falls": ({"cu_seqlens_q": int32([0, 7, 6])}, r"cu_seqlens_q must rise from 0 to 6, got \[0, 7, 6\]"),
    "max_seqlen_q-missing": ({"max_seqlen_q": None}, r"max_seqlen_q must be an int >= 0, got None"),
    "max_seqlen_k-negative": ({"max_seqlen_k": -1}, r"max_seqlen_k must be an int >= 0, got -1"),
    "max_seqlen_q-too-short": ({"max_seqlen_q": 3}, r"max_seqlen_q must be at least 4, the longest sequence, got 3"),
    "max_seqlen_k-too-short": ({"max_seqlen_k": 3}, r"max_seqlen_k must be at least 4, the longest sequence, got 3"),
    "sinks-too-many": ({"sinks": 5}, r"sinks must be in \[0, 4\], the longest sequence of keys, got 5"),
    "positions-batch": ({"sinks": int32([[0]])}, r"sinks must be an int or int32 \[2, n\], got \(1, 1\)"),
    "heads": ({"q": PACKED_Q[:, :3]}, r"heads of q must be a multiple of those of k, got 3 and 2"),
}


def packed_arguments(**changed):
    return {
        "q": PACKED_Q,
        "k": PACKED_KV,
        "v": PACKED_KV,
        "cu_seqlens_q": STARTS,
        "cu_seqlens_k": STARTS,
        "max_seqlen_q": 4,
        "max_seqlen_k": 4,
        **changed,
    }


def test_unchanged_arguments_are_fine():
    """Else every test below could raise for a reason of its own."""
    sk.flash_attn_stats(Q, KV, KV)
    sk.flash_attn_stats_varlen(**packed_arguments())


@pytest.mark.parametrize("name", DENSE)
def test_dense_arguments(name):
    changed, message = DENSE[name]
    with pytest.raises(ValueError, match=message):
        sk.flash_attn_stats(**{"q": Q, "k": KV, "v": KV, **changed})


@pytest.mark.parametrize("name", PACKED)
def test_packed_arguments(name):
    changed, message = PACKED[name]
    with pytest.raises(ValueError, match=message):
        sk.flash_attn_stats_varlen(**packed_arguments(**changed))


@pytest.mark.parametrize("name", ["k-not-a-tensor", "q-integer"])
def test_wrong_tensors_under_autocast(name):
    changed, message = DENSE[name]
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=message):
        sk.flash_attn_stats(**{"q": Q, "k": KV, "v": KV, **changed})


@pytest.mark.parametrize("name", ["leftpad_k", "seqused_q", "seqused_k"])
def test_padding_of_packed_inputs(name):
    """Packed sequences have no padding: an option that would be ignored, or misread, raises."""
    with pytest.raises(ValueError, match=rf"{name} .*packed"):
        sk.make_inputs(**packed_arguments(), **{name: int32([0, 0])})


def test_named_backend_lists_all_its_reasons(monkeypatch):
    picky = replace(sk.BACKENDS["cpu"], unsupported_reasons=lambda inputs: ["needs a moon", "needs D 7, got D 8"])
    monkeypatch.setitem(sk.BACKENDS, "cpu", picky)
    with pytest.raises(ValueError, match=r"backend 'cpu' cannot run these inputs: needs a moon; needs D 7, got D 8"):
        sk.flash_attn_stats(Q, KV, KV, backend="cpu")


def test_cpu_backend_refuses_other_devices():
    inputs = replace(sk.make_inputs(Q, KV, KV), q=Q.to("meta"))
    with pytest.raises(ValueError, match=r"backend 'cpu' cannot run these inputs: runs on cpu, got meta"):
        sk.choose_backend(inputs, "cpu")


def test_auto_with_no_backend_left(monkeypatch):
    for name in backends.AUTO_ORDER:
        refusing = replace(sk.BACKENDS[name], unsupported_reasons=lambda inputs, name=name: [f"{name} is shut"])
        monkeypatch.setitem(sk.BACKENDS, name, refusing)
    with pytest.raises(ValueError, match=r"no backend can run these inputs: .*cpu is shut.*reference is shut"):
        sk.flash_attn_stats(Q, KV, KV)


def test_auto_falls_back_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(backends, "_logged", set())
    for name in backends.AUTO_ORDER:
        if name != "reference":
            shut = replace(sk.BACKENDS[name], unsupported_reasons=lambda inputs, name=name: [f"{name} is shut"])
            monkeypatch.setitem(sk.BACKENDS, name, shut)
    with caplog.at_level(logging.WARNING, "surgery_kernels"):
        assert sk.choose_backend(sk.make_inputs(Q, KV, KV)) == "reference"
        assert sk.choose_backend(sk.make_inputs(Q, KV, KV)) == "reference"
    assert len(caplog.records) == 1 and "cpu: cpu is shut" in caplog.text


def test_auto_takes_the_first_that_can_and_stays_quiet(caplog):
    with caplog.at_level(logging.DEBUG, "surgery_kernels"):
        inputs = sk.make_inputs(Q, KV, KV)
        chosen = sk.choose_backend(inputs)
    assert chosen == next(name for name, reasons in sk.backend_reasons(inputs).items() if not reasons) == "cpu"
    assert not caplog.records


def test_named_reference_is_not_a_fallback(caplog):
    with caplog.at_level(logging.DEBUG, "surgery_kernels"):
        assert sk.choose_backend(sk.make_inputs(Q, KV, KV), "reference") == "reference"
    assert not caplog.records
