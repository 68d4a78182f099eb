"""What the GPU backends share: a vendor's kernel, which knows no statistic, becomes one with differentiable sink mass.

The forward is the vendor's, then one pass over q. In the backward the vendor's kernel is not shown the sink keys, and
its delta is moved by g * sink_mass - dlse, through its lse gradient where it takes one and through `out` where it
does not; the sink keys' columns are added in one pass over q, dout and dq.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from . import cuda, in_torch
from .sequences import hidden_keys, is_padded, pack_rows, problem_of, unpack_rows


class Kernel(NamedTuple):
    """A vendor's attention.

    Attributes:
        attend: Problem -> (out as q, lse [B, H, T] or packed [H, total]).
        gradients: (Problem, out, lse, dout, dlse or None) -> dq, dk, dv.
        takes_dlse: whether `gradients` uses dlse; if not, its only use of `out` is rowsum(dout * out).
        top_left: causal is aligned at the top left.
        blind_lse: what `gradients` wants as the lse of a row that sees no key.
        rows_like: q -> unwritten tensor for rows of out and dout, in the layout that the kernel wants.
    """

    attend: Callable
    gradients: Callable
    takes_dlse: bool = False
    top_left: bool = False
    blind_lse: float = float("-inf")
    rows_like: Callable = torch.empty_like


def forward(inputs, kernel):
    """(out, lse, stats [S, *rows]) of a backend."""
    problem = problem_of(inputs, top_left=kernel.top_left)
    out, lse = kernel.attend(problem)
    if is_padded(inputs):
        out, lse = out.unflatten(0, inputs.q.shape[:2]), unpack_rows(lse, inputs.q.shape[0])
    lse = lse.masked_fill(lse.isinf() | _padded_rows(inputs), float("-inf"))
    if is_padded(inputs):
        out = out.masked_fill(_per_row(inputs, lse.isinf()), 0.0)
    stats = lse.new_zeros((len(inputs.stats), *lse.shape))
    if inputs.stats and inputs.n_sinks:
        stats = sink_mass(inputs, lse)[None]
    return out.contiguous(), lse, stats


def backward(inputs, kernel, out, lse, stats, dout, dlse, dstats):
    """dq, dk, dv of a backend."""
    g = dstats[0] if dstats is not None and inputs.stats and inputs.n_sinks else None
    dout = torch.zeros_like(out) if dout is None else dout
    blind = lse.isinf()
    kernel_lse = lse.masked_fill(blind, kernel.blind_lse)
    if g is None and dlse is None:
        problem = problem_of(inputs, top_left=kernel.top_left)
        return _visible_only(inputs, blind, *_gradients(inputs, kernel, problem, out, kernel_lse, dout, None))
    extra = torch.zeros_like(lse) if dlse is None else -dlse
    if g is not None:
        extra = extra + g * stats[0]
        g = g.masked_fill(blind, 0.0)
    extra = extra.masked_fill(blind, 0.0)
    problem = problem_of(inputs, g is not None, kernel.top_left)
    delta = None
    if kernel.takes_dlse:
        grads = _gradients(inputs, kernel, problem, out, kernel_lse, dout, -extra)
    else:
        folded, folded_dout, delta = fold(inputs, out, dout, extra, kernel.rows_like, problem.first_row)
        grads = _gradients(inputs, kernel, problem, folded, kernel_lse, folded_dout, None)
    if g is None:
        return _visible_only(inputs, blind, *grads)
    return _with_sinks(inputs, problem, blind, lse, g, out, dout, extra, delta, *grads)


def _gradients(inputs, kernel, problem, out, lse, dout, dlse):
    """The kernel's dq, dk, dv in the layout of the problem's q, k and v; out and dout may lack its first rows."""
    if problem.empty:
        return tuple(x.new_zeros(x.shape) for x in (problem.q, problem.k, problem.v))
    if is_padded(inputs):
        out, dout = out.flatten(0, 1), dout.flatten(0, 1)
        lse, dlse = (None if x is None else pack_rows(x) for x in (lse, dlse))
    elif problem.first_row:
        lse, dlse = (None if x is None else x[..., problem.first_row :].contiguous() for x in (lse, dlse))
    grads = kernel.gradients(problem, out, lse, dout, dlse)
    if is_padded(inputs):
        grads = [x.unflatten(0, like.shape[:2]) for x, like in zip(grads, (inputs.q, inputs.k, inputs.v), strict=True)]
    return grads


def _visible_only(inputs, blind, dq, dk, dv):
    """What nobody sees has gradient 0, whatever the kernel left in its memory."""
    if is_padded(inputs):
        hidden = _padded_keys(inputs)[:, :, None, None]
        dq = dq.masked_fill(_per_row(inputs, blind), 0.0)
        dk, dv = (x.masked_fill(hidden, 0.0) for x in (dk, dv))
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _with_sinks(inputs, problem, blind, lse, g, out, dout, extra, delta, dq, dk, dv):
    if problem.first_key:
        dk, dv = (torch.cat([x.new_zeros((x.shape[0], problem.first_key, *x.shape[2:])), x], 1) for x in (dk, dv))
    else:
        hidden = hidden_keys(inputs)[..., None, None]
        dk, dv = (x.contiguous().masked_fill_(hidden, 0.0) for x in (dk, dv))
    if cuda.can_run(inputs):
        folded = {"out": out, "extra": extra} if delta is None else {"delta": delta}
        dq = cuda.add_sinks(inputs, lse, g, dout, dq, dk, dv, first_row=problem.first_row, **folded)
        return dq, dk, dv
    delta = delta_of(inputs, out, dout, extra) if delta is None else delta
    if problem.first_row:
        dq = torch.cat([dq.new_zeros((dq.shape[0], problem.first_row, *dq.shape[2:])), dq], 1)
    mask = _per_row(inputs, blind)
    dq, dout = dq.masked_fill(mask, 0.0).contiguous(), dout.masked_fill(mask, 0.0)
    shift = (g - delta).masked_fill(blind, 0.0)
    for part in _sequences(inputs):
        one, (lse_one, shift_one), (dout_one, dq_one), (dk_one, dv_one) = part((lse, shift), (dout, dq), (dk, dv))
        keys, sees = in_torch.sinks_of(one)
        in_torch.add_sink_columns(one, keys, lse_one, sees, shift_one, dout_one, dq_one, dk_one, dv_one)
    return dq, dk, dv


def sink_mass(inputs, lse):
    """Rows of attention on the sink keys, by CUDA or torch."""
    if cuda.can_run(inputs):
        return cuda.sink_mass(inputs, lse)
    mass = torch.zeros_like(lse)
    for part in _sequences(inputs):
        one, (lse_one, mass_one), _, _ = part((lse, mass), (), ())
        keys, sees = in_torch.sinks_of(one)
        mass_one.copy_(in_torch.sink_mass(one, keys, lse_one, sees))
    return mass


def fold(inputs, out, dout, extra, rows_like=torch.empty_like, first_row=0):
    """(out', dout') of the rows from `first_row` on, and delta of all; see in_torch.fold_into_out."""
    if cuda.can_run(inputs):
        folded, folded_dout = (rows_like(inputs.q if not first_row else inputs.q[:, first_row:]) for _ in range(2))
        delta = cuda.fold(inputs, out, dout, extra, folded, folded_dout, first_row)
        return folded, folded_dout, delta
    delta = delta_of(inputs, out, dout, extra)
    dense = (out, dout, extra) if out.dim() == 4 else (out[None], dout[None], extra[None])
    folded = in_torch.fold_into_out(*dense)
    if out.dim() == 3:
        return folded[0][0], folded[1][0], delta
    rows = (x[:, first_row:] for x in folded)
    return (*(rows_like(x).copy_(x) for x in rows), delta)


def delta_of(inputs, out, dout, extra):
    """Rows of rowsum(dout * out) + extra."""
    if inputs.is_varlen:
        return in_torch.delta_of(out[None], dout[None], extra[None])[0]
    return in_torch.delta_of(out, dout, extra)


def _sequences(inputs):
    """Functions that cut (rows, q-like, k-like) tensors to dense pieces, one a packed sequence. Waits for the GPU."""
    if not inputs.is_varlen:
        yield lambda rows, of_q, of_k: (inputs, rows, of_q, of_k)
        return
    for rows_q, rows_k, one in inputs.unpack():
        if rows_k.start == rows_k.stop:
            continue

        def part(rows, of_q, of_k, rows_q=rows_q, rows_k=rows_k, one=one):
            return (
                one,
                tuple(x[None, :, rows_q] for x in rows),
                tuple(x[None, rows_q] for x in of_q),
                tuple(x[None, rows_k] for x in of_k),
            )

        yield part


def _per_row(inputs, rows):
    """Rows [B, H, T] or [H, total] as a mask for tensors shaped as q."""
    return (rows.transpose(0, 1) if inputs.is_varlen else rows.transpose(1, 2)).unsqueeze(-1)


def _padded_rows(inputs):
    """Rows that do not exist, to be combined with rows [B, H, T]; False where all do."""
    if inputs.seqused_q is None:
        return torch.zeros((), dtype=torch.bool, device=inputs.q.device)
    row = torch.arange(inputs.q.shape[1], device=inputs.q.device)
    return (row >= inputs.seqused_q[:, None])[:, None]


def _padded_keys(inputs):
    """[B, Tk] bool."""
    key = torch.arange(inputs.k.shape[1], device=inputs.k.device)
    padded = torch.zeros((inputs.k.shape[:2]), dtype=torch.bool, device=inputs.k.device)
    if inputs.leftpad_k is not None:
        padded = padded | (key < inputs.leftpad_k[:, None])
    if inputs.seqused_k is not None:
        padded = padded | (key >= inputs.seqused_k[:, None])
    return padded
