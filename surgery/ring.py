"""Attention of a sequence that is split over ranks, with its sink mass and the regulariser's gradient: a ring.

Rank r holds the rows and keys [r C, (r + 1) C). Keys and values travel from rank to rank; the outputs of their blocks
are merged by their log-sum-exp. With the final lse of a row and the sink keys, which every rank gets,

    sink_mass_i = sum_{j in S} exp(s_ij - lse_i)

so alpha is a sum over ranks of [B, H] numbers. In the backward each block is a flash backward with the final out and
lse; the statistic adds to it, with g = dL/d sink_mass, what a gradient of lse would (every block's delta grows by
g_i sink_mass_i), and on the sink keys alone ds_ij += p_ij g_i, whose dk goes home by another sum over ranks.
"""

from dataclasses import dataclass

import surgery_kernels as sk
import torch
import torch.distributed as dist
from torch import Tensor

from .penalty_op import head_divergence, sequence_means


@dataclass(frozen=True)
class Ring:
    """One layer's problem on this rank.

    Attributes:
        group, rank, size: the ranks that share the sequence.
        bounds: int32 [B, 2], the real tokens of the whole sequences.
        softmax_scale, causal, softcap, backend: as for `flash_attn_stats`.
    """

    group: dist.ProcessGroup
    rank: int
    size: int
    bounds: Tensor
    softmax_scale: float | None
    causal: bool
    softcap: float
    backend: str

    def block(self, q, k, v, source):
        """AttnInputs of this rank's rows against the keys of rank `source`, None when no row sees any."""
        if self.causal and source > self.rank:
            return None
        length = q.shape[1]
        first, end = self.bounds.unbind(1)

        def inside(position, rank):
            return (position - rank * length).clamp(0, length)

        return sk.make_inputs(
            q,
            k,
            v,
            self.softmax_scale,
            # keys of an earlier rank are all behind
            self.causal and source == self.rank,
            softcap=self.softcap,
            sinks=0,
            stats=(),
            leftpad_k=inside(first, source),
            seqused_q=inside(end, self.rank),
            seqused_k=inside(end, source),
        )

    def choose(self, inputs):
        """The backend of one block.

        Raises:
            ValueError: it is the reference, which computes p anew from the block instead of taking the final lse.
        """
        chosen = sk.choose_backend(inputs, self.backend)
        if chosen == "reference":
            raise ValueError("a ring needs a backend that takes the final lse, not 'reference': see `surgery env`")
        return chosen

    def travel(self, tensors):
        """Yield (source rank, tensors) for each rank's tensors, its own first."""
        for step in range(self.size):
            yield (self.rank - step) % self.size, tensors
            if step < self.size - 1:
                tensors = self.rotate(tensors)

    def rotate(self, tensors):
        """Hand `tensors` to the next rank; returns those of the rank before."""
        if self.size == 1:
            return tensors
        after, before = (dist.get_global_rank(self.group, (self.rank + d) % self.size) for d in (1, -1))
        sent = [x.contiguous() for x in tensors]
        received = [torch.empty_like(x) for x in sent]
        operations = []
        for out, into in zip(sent, received, strict=True):
            operations += [dist.P2POp(dist.isend, out, after, self.group)]
            operations += [dist.P2POp(dist.irecv, into, before, self.group)]
        for request in dist.batch_isend_irecv(operations):
            request.wait()
        return received

    def local(self, rows):
        """This rank's part of [B, T]."""
        return rows.chunk(self.size, 1)[self.rank]


class SinkKeys:
    """The sink keys of whole sequences, on every rank: k [B, n, H_kv, D], and which rows of this rank see them."""

    def __init__(self, ring, probe, k):
        first, end = ring.bounds.long().unbind(1)
        batch, length = k.shape[:2]
        if probe.sinks is None:
            offset = torch.arange(probe.n_sinks, device=k.device).expand(batch, -1)
        else:
            offset = probe.sinks.long()
        repeated = (offset[:, :, None] == offset[:, None, :]).tril(-1).any(-1)
        position = offset + first[:, None]
        valid = (position < end[:, None]) & ~repeated
        local = position - ring.rank * length
        self.mine = valid & (local >= 0) & (local < length)
        self.index = local.clamp(0, length - 1)[:, :, None, None].expand(-1, -1, *k.shape[2:])
        self.k = k.gather(1, self.index) * self.mine[:, :, None, None]
        # the owner's key plus zeros: a broadcast for each sequence's own owner
        dist.all_reduce(self.k, group=ring.group)
        row = torch.arange(length, device=k.device) + ring.rank * length
        seen = valid[:, None, :] & (row[None, :, None] < end[:, None, None])
        if ring.causal:
            seen = seen & (row[None, :, None] >= position[:, None, :])
        self.seen = seen[:, None, None]
        self.ring = ring

    def probabilities(self, q, lse):
        """(p, s) [B, H_kv, G, C, n] on the sink keys: attention, 0 where not seen, and scores."""
        ring, n_kv = self.ring, self.k.shape[2]
        q = q.to(lse.dtype).unflatten(2, (n_kv, -1))
        scale = q.shape[-1] ** -0.5 if ring.softmax_scale is None else ring.softmax_scale
        s = torch.einsum("bthgd,bnhd->bhgtn", q, self.k.to(lse.dtype)) * scale
        if ring.softcap:
            s = ring.softcap * torch.tanh(s / ring.softcap)
        lse = lse.unflatten(1, (n_kv, -1)).unsqueeze(-1)
        return torch.exp(torch.where(self.seen & (lse != float("-inf")), s - lse, float("-inf"))), s

    def add_gradient(self, q, lse, g, dq, dk):
        """Add ds = p g on the sink keys to dq [B, C, H, D] and, on their owners, to dk [B, C, H_kv, D], in place."""
        ring = self.ring
        p, s = self.probabilities(q, lse)
        ds = p * g.unflatten(1, (self.k.shape[2], -1)).unsqueeze(-1)
        if ring.softcap:
            ds = ds * (1 - (s / ring.softcap) ** 2)
        ds = ds * (q.shape[-1] ** -0.5 if ring.softmax_scale is None else ring.softmax_scale)
        dq += torch.einsum("bhgtn,bnhd->bthgd", ds, self.k.to(ds.dtype)).flatten(2, 3)
        dk_sink = torch.einsum("bhgtn,bthgd->bnhd", ds, q.to(ds.dtype).unflatten(2, (self.k.shape[2], -1)))
        dist.all_reduce(dk_sink, group=ring.group)
        dk.scatter_add_(1, self.index, dk_sink.to(dk.dtype) * self.mine[:, :, None, None])


def ring_forward(ring, q, k, v):
    """out [B, C, H, D] and lse [B, H, C] of this rank's rows against all keys."""
    out = lse = None
    for source, (k_block, v_block) in ring.travel((k, v)):
        inputs = ring.block(q, k_block, v_block, source)
        if inputs is None:
            continue
        out_block, lse_block, _ = sk.attn_forward(inputs, ring.choose(inputs))
        out_block = out_block.to(lse_block.dtype)
        out, lse = (out_block, lse_block) if out is None else _merge(out, lse, out_block, lse_block)
    return out.to(q.dtype), lse


def _merge(out, lse, out_block, lse_block):
    merged = torch.logaddexp(lse, lse_block)
    # -inf - -inf: rows that have seen no key in either
    pivot = merged.masked_fill(merged == float("-inf"), 0.0)
    weights = (torch.exp(x - pivot).transpose(1, 2).unsqueeze(-1) for x in (lse, lse_block))
    return out * next(weights) + out_block * next(weights), merged


def ring_backward(ring, q, k, v, out, lse, dout, dlse):
    """dq, dk, dv of this rank in the dtype of lse."""
    dq, dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (q, k, v))
    no_stats = lse.new_zeros(0, *lse.shape)
    moving = (k, v, dk, dv)
    for step in range(ring.size):
        source = (ring.rank - step) % ring.size
        k_block, v_block, dk, dv = moving
        inputs = ring.block(q, k_block, v_block, source)
        if inputs is not None:
            found = sk.attn_backward(inputs, out, lse, no_stats, dout, dlse, None, ring.choose(inputs))
            for total, part in zip((dq, dk, dv), found, strict=True):
                total += part
        # one more step than in the forward: dk and dv come home
        moving = ring.rotate((k_block, v_block, dk, dv))
    return dq, *moving[2:]


def ring_columns(ring, q, k, v, lse):
    """[B, C] attention that this rank's keys receive in total, all heads and all ranks' rows; no gradient."""
    columns = torch.zeros(k.shape[:2], dtype=torch.float32, device=k.device)
    moving = (k, columns)
    for step in range(ring.size):
        k_block, columns = moving
        inputs = ring.block(q, k_block, k_block, (ring.rank - step) % ring.size)
        if inputs is not None:
            columns = columns + sk.column_mass(inputs, lse).sum(1)
        moving = ring.rotate((k_block, columns))
    return moving[1]


class RingAttention(torch.autograd.Function):
    """out [B, C, H, D] of this rank's rows, and alpha [B, H] of the whole sequences, which carries no gradient.

    The gradient of the penalty enters in the backward, as in penalty_op.py.
    """

    @staticmethod
    def forward(ctx, q, k, v, probe, layer, ring):
        out, lse = ring_forward(ring, q, k, v)
        mass = SinkKeys(ring, probe, k).probabilities(q, lse)[0].sum(-1).flatten(1, 2)
        alpha = sequence_means(mass, ring.local(probe.row_weight).to(mass.dtype))
        dist.all_reduce(alpha, group=ring.group)
        ctx.save_for_backward(q, k, v, out, lse, mass, alpha)
        ctx.probe, ctx.layer, ctx.ring = probe, layer, ring
        ctx.mark_non_differentiable(alpha)
        return out, alpha

    @staticmethod
    def backward(ctx, dout, _):
        q, k, v, out, lse, mass, alpha = ctx.saved_tensors
        probe, ring = ctx.probe, ctx.ring
        positive = head_divergence(alpha, probe.n_harmful) > 0 if probe.positive is None else probe.positive[ctx.layer]
        weight = ring.local(probe.row_weight) * probe.share[:, None]
        g = probe.control[0] * positive.to(mass.dtype)[:, None] * weight.to(mass.dtype)[:, None]
        probe.control.data[1 + ctx.layer] = 1.0
        dq, dk, dv = ring_backward(ring, q, k, v, out, lse, dout.contiguous(), -(g * mass))
        SinkKeys(ring, probe, k).add_gradient(q, lse, g, dq, dk)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None
