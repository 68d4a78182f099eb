"""Sink mass beside a kernel with a differentiable lse: exp(scale * q . k_sink - lse), a few lines of autograd."""

import torch


def sink_mass_heads_first(q, k_sink, lse, scale, unseen=None):
    """[B, H, T] fp32 from q [B, H, T, D], k_sink [B, H_kv, 1 or T, D], lse [B, H, T], unseen [T] bool (see below)."""
    grouped = q.unflatten(1, (k_sink.shape[1], -1)).float()
    s = (grouped * k_sink[:, :, None].float()).sum(-1).flatten(1, 2) * scale
    return _mass(s, lse, unseen)


def sink_mass_heads_last(q, k_sink, lse, scale, unseen=None):
    """[B, H, T] fp32 from q [B, T, H, D], k_sink [B, 1 or T, H_kv, D], lse [B, H, T], unseen [T] bool (see below)."""
    grouped = q.unflatten(2, (k_sink.shape[2], -1)).float()
    s = (grouped * k_sink[:, :, :, None].float()).sum(-1).flatten(2, 3) * scale
    return _mass(s.transpose(1, 2), lse, unseen)


def _mass(s, lse, unseen):
    if unseen is not None:
        # not a factor 0 behind the exp: a score that is no part of lse may overflow it
        s = s.masked_fill(unseen, float("-inf"))
    return torch.exp(s - lse)


def unseen_rows(case, device):
    """[T] bool: the rows whose window does not reach the sink; None when all do."""
    return torch.arange(case.length, device=device) > case.left if case.left >= 0 else None


def first_of_row(case, device):
    """[total] position of the first key of each row's sequence in a packed row."""
    starts, lengths = torch.tensor(case.starts[:-1]), torch.tensor(case.lengths)
    return starts.repeat_interleave(lengths).to(device)


def allow_many_shapes():
    """One process compiles the same function for every case; torch's limit of 8 would stop it."""
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.accumulated_recompile_limit = 1024
