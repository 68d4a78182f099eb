"""CPU doubles of the vendors' kernels: their arguments, layouts, alignment and conventions, and their use of `out`.

`flash` and `cudnn` are torch's own flash attention for CPU behind the operators' signatures, so a real kernel is
folded into; `fa4` is written out and rounds p and ds to the inputs' dtype before it multiplies, as tensor cores do.
"""

import itertools
import sys
import types

import surgery_kernels as sk
import torch
from surgery_kernels.backends import cudnn, flash

_cpu_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
INF = float("inf")


def _mask(len_q, len_k, causal, left, right, dtype):
    """[Tq, Tk] additive, aligned at the bottom right."""
    i, j = torch.arange(len_q)[:, None] + len_k - len_q, torch.arange(len_k)
    seen = torch.ones(len_q, len_k, dtype=torch.bool)
    if causal or right is not None:
        seen &= j <= i + (0 if causal else right)
    if left is not None:
        seen &= j >= i - left
    return torch.zeros(len_q, len_k, dtype=dtype).masked_fill_(~seen, -INF), ~seen.any(-1)


def _pieces(q, cu_q, cu_k):
    """Slices of rows and of keys of each sequence; dense tensors are one."""
    if cu_q is None:
        return [(slice(None), slice(None))]
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.shape == cu_k.shape
    starts = [list(itertools.pairwise(x.tolist())) for x in (cu_q, cu_k)]
    assert all(a <= b for pairs in starts for a, b in pairs)
    return [(slice(*a), slice(*b)) for a, b in zip(*starts, strict=True)]


def _dense(x, cu):
    """[B, H, T, D]."""
    return (x if cu is None else x[None]).transpose(1, 2)


class FlashDouble:
    """aten._flash_attention_forward and _backward: bottom-right, lse +inf for a row that sees nothing."""

    def __init__(self):
        self.seen_out = None

    def forward(
        self, q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale,
        window_size_left=None, window_size_right=None,
    ):  # fmt: skip
        assert dropout == 0.0 and not debug and (cu_q is None) == (q.dim() == 4)
        out = torch.full(q.shape, float("nan"), dtype=q.dtype)
        rows = (q.shape[0], q.shape[2], q.shape[1]) if cu_q is None else (q.shape[1], q.shape[0])
        lse = torch.full(rows, float("nan"), dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
        for of_q, of_k in _pieces(q, cu_q, cu_k):
            one = [_dense(x[of], cu_q) for x, of in ((q, of_q), (k, of_k), (v, of_k))]
            made, lse_one = torch.zeros_like(one[0]), torch.full(one[0].shape[:3], INF, dtype=lse.dtype)
            if one[0].shape[2] and one[1].shape[2]:
                sizes = one[0].shape[2], one[1].shape[2]
                mask, blind = _mask(*sizes, causal, window_size_left, window_size_right, q.dtype)
                made, lse_one = _cpu_forward(*one, 0.0, False, attn_mask=mask, scale=scale)
                made, lse_one = made.masked_fill(blind[:, None], 0.0), lse_one.masked_fill(blind, INF)
            made = made.transpose(1, 2)
            out[of_q] = made if cu_q is None else made[0]
            lse[..., of_q] = lse_one if cu_q is None else lse_one[0]
        return out, lse, torch.empty(0), torch.empty(0), torch.empty(0)

    def backward(
        self, dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, seed, offset, *, scale,
        window_size_left=None, window_size_right=None,
    ):  # fmt: skip
        assert dropout == 0.0 and out.shape == dout.shape == q.shape and not lse.isneginf().any()
        self.seen_out = out
        # what no sequence covers stays nan, and so shows
        grads = [torch.full(x.shape, float("nan"), dtype=x.dtype) for x in (q, k, v)]
        for of_q, of_k in _pieces(q, cu_q, cu_k):
            one = [_dense(x[of], cu_q) for x, of in ((dout, of_q), (q, of_q), (k, of_k), (v, of_k), (out, of_q))]
            made = [torch.zeros_like(x) for x in one[1:4]]
            if one[1].shape[2] and one[2].shape[2]:
                sizes = one[1].shape[2], one[2].shape[2]
                mask, _ = _mask(*sizes, causal, window_size_left, window_size_right, q.dtype)
                lse_one = lse[..., of_q] if cu_q is None else lse[None, :, of_q]
                blind = lse_one.isposinf()
                one[0] = one[0].masked_fill(blind[..., None], 0.0)
                lse_one = lse_one.masked_fill(blind, 1e30)
                made = _cpu_backward(*one, lse_one, 0.0, False, attn_mask=mask, scale=scale)
            for grad, of, x in zip(grads, (of_q, of_k, of_k), made, strict=True):
                grad[of] = x.transpose(1, 2) if cu_q is None else x[0].transpose(0, 1)
        return grads


class CudnnDouble:
    """aten._scaled_dot_product_cudnn_attention and its backward: [B, H, T, D], top-left, lse [B, H, T, 1] or without.

    Plans are cached by the strides of q: out and dout must have the strides of an output of that q.
    """

    def __init__(self, lse_dims=4):
        self.lse_dims = lse_dims

    def forward(self, q, k, v, bias, with_lse, dropout, causal, debug, *, scale):
        assert bias is None and with_lse and dropout == 0.0 and not debug
        out, lse = _cpu_forward(q, k, v, 0.0, causal, scale=scale)
        return torch.empty_like(q).copy_(out), lse.unsqueeze(-1) if self.lse_dims == 4 else lse

    def backward(
        self, dout, q, k, v, out, lse, seed, offset, bias, cu_q, cu_k, max_q, max_k, dropout, causal, *, scale
    ):
        assert bias is None and cu_q is None and cu_k is None and (max_q, max_k) == (q.shape[2], k.shape[2])
        assert lse.dim() == self.lse_dims and out.stride() == dout.stride() == torch.empty_like(q).stride()
        lse = lse.flatten(2)
        made = _cpu_backward(dout, q, k, v, out, lse, 0.0, causal, scale=scale)
        return [torch.empty_like(x).copy_(grad) for x, grad in zip((q, k, v), made, strict=True)]


class Fa4Double:
    """flash_attn.cute.interface: bottom-right, softcap, lse -inf for a row that sees nothing, dlse in the backward."""

    def _flash_attn_fwd(self, q, k, v, *, return_lse, cu_seqlens_q, cu_seqlens_k, **options):
        assert return_lse
        out = torch.full(q.shape, float("nan"), dtype=q.dtype)
        rows = (q.shape[0], q.shape[2], q.shape[1]) if cu_seqlens_q is None else (q.shape[1], q.shape[0])
        lse = torch.full(rows, float("nan"), dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
        for of_q, of_k in _pieces(q, cu_seqlens_q, cu_seqlens_k):
            one = [_dense(x[of], cu_seqlens_q) for x, of in ((q, of_q), (k, of_k), (v, of_k))]
            s, _ = _scores(*one[:2], lse.dtype, **options)
            lse_one = torch.logsumexp(s, -1)
            # rounded before it is divided by its sum, as an online softmax does it
            p = torch.exp(s - s.amax(-1, keepdim=True).nan_to_num(neginf=0.0)) if s.shape[-1] else s
            made = p.to(q.dtype).to(lse.dtype) @ _each_head(one[2], one[0], lse.dtype)
            made = (made / p.sum(-1, keepdim=True).masked_fill(lse_one.isneginf()[..., None], 1.0)).transpose(1, 2)
            out[of_q] = (made if cu_seqlens_q is None else made[0]).to(q.dtype)
            lse[..., of_q] = lse_one if cu_seqlens_q is None else lse_one[0]
        # newer releases return more than two
        return out, lse, None, None, None

    def _flash_attn_bwd(self, q, k, v, out, dout, lse, *, deterministic, dlse, cu_seqlens_q, cu_seqlens_k, **options):
        wide = lse.dtype
        assert lse.is_contiguous() and (dlse is None or (dlse.dtype == wide and dlse.is_contiguous()))
        grads = [torch.full(x.shape, float("nan"), dtype=x.dtype) for x in (q, k, v)]
        for of_q, of_k in _pieces(q, cu_seqlens_q, cu_seqlens_k):
            dense = [
                _dense(x[of], cu_seqlens_q) for x, of in ((q, of_q), (k, of_k), (v, of_k), (out, of_q), (dout, of_q))
            ]
            q1, k1, v1 = dense[:3]
            o, do = (x.to(wide) for x in dense[3:])
            rows = [
                None if x is None else (x[..., of_q] if cu_seqlens_q is None else x[None, :, of_q]) for x in (lse, dlse)
            ]
            s, slope = _scores(q1, k1, wide, **options)
            p = torch.exp(s - rows[0].nan_to_num(neginf=INF)[..., None])
            delta = (o * do).sum(-1) - (0.0 if rows[1] is None else rows[1])
            ds = p * (do @ _each_head(v1, q1, wide).transpose(-1, -2) - delta[..., None]) * slope
            p, ds = (x.to(q.dtype).to(wide) for x in (p, ds))
            made = (
                ds @ _each_head(k1, q1, wide),
                _each_group(ds.transpose(-1, -2) @ q1.to(wide), k1),
                _each_group(p.transpose(-1, -2) @ do, k1),
            )
            for grad, of, x in zip(grads, (of_q, of_k, of_k), made, strict=True):
                x = x.to(q.dtype).transpose(1, 2)
                grad[of] = x if cu_seqlens_q is None else x[0]
        return grads


def _each_head(x, q, dtype):
    return x.to(dtype).repeat_interleave(q.shape[1] // x.shape[1], 1)


def _each_group(x, k):
    return x.unflatten(1, (k.shape[1], -1)).sum(2)


def _scores(
    q, k, dtype, *, softmax_scale, causal, softcap, window_size_left, window_size_right, max_seqlen_q, max_seqlen_k
):
    s = q.to(dtype) @ _each_head(k, q, dtype).transpose(-1, -2) * softmax_scale
    slope = softmax_scale
    if softcap:
        t = torch.tanh(s / softcap)
        s, slope = softcap * t, slope * (1 - t * t)
    mask, _ = _mask(s.shape[-2], s.shape[-1], causal, window_size_left, window_size_right, dtype)
    return s + mask, slope


VENDORS = ("fa4", "cudnn", "flash")


def install(monkeypatch, vendor, lse_dims=4):
    """Put the double in the place of the vendor's kernel."""
    if vendor == "fa4":
        interface = types.ModuleType("flash_attn.cute.interface")
        double = Fa4Double()
        interface._flash_attn_fwd, interface._flash_attn_bwd = double._flash_attn_fwd, double._flash_attn_bwd
        for name in ("flash_attn", "flash_attn.cute"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", interface)
        return double
    module = {"cudnn": cudnn, "flash": flash}[vendor]
    double = CudnnDouble(lse_dims) if vendor == "cudnn" else FlashDouble()
    monkeypatch.setattr(module, "_forward_op", double.forward)
    monkeypatch.setattr(module, "_backward_op", double.backward)
    if vendor == "cudnn":
        monkeypatch.setattr(cudnn, "_lse_dims", {})
    return double


def reasons_but_the_machine(vendor, inputs):
    """The backend's reasons against a problem, without those that a CPU machine and a test's dtype give."""
    machine = ("runs on", "takes torch.", "head_dim must", "flash-attn-4 is not")
    return [reason for reason in sk.BACKENDS[vendor].unsupported_reasons(inputs) if not reason.startswith(machine)]
