"""Correctness before timing: fp64 attention in blocks of rows, and the 2x rule.

The error of an implementation may be at most twice (`Implementation.factor`) that of plain PyTorch at the same dtype,
both against fp64 on the same rounded inputs, plus one rounding. Statistics of an exact implementation are held to fp32
tolerances instead, whatever the dtype. Groups of query heads that share a key head are checked whole, all of their
rows and gradients; of a large problem only as many groups as the budget allows, first and last among them.
"""

from dataclasses import dataclass

import torch

GRADIENTS = ("dq", "dk", "dv")
BLOCK_ELEMENTS = 1 << 26
# operations of the fp64 check: seconds on either device
BUDGET = {"cpu": 2e10, "cuda": 1.5e13}
MAX_GROUPS = 32
STATISTIC_TOLERANCE = (1e-4, 2e-6)
# of a mean in fp16 from tf32 scores, which is what flash-colsum returns
COLUMN_MEAN_TOLERANCE = (1e-2, 1e-6)


def attention_in_blocks(q, k, v, dout, dsink_mass, scale, causal, left, dtype):
    """One group of heads by autograd, a block of rows at a time.

    Args:
        q, dout: [G, T, D]; k, v: [T, D]; dsink_mass: [G, T].
        left: keys seen to the left, -1 for all.
        dtype: everything is rounded to it as plain PyTorch would; sums over blocks are kept in fp32 at least.
    Returns:
        dict of out, sink_mass, lse, column_mass; dq, dk, dv of both upstream gradients, and dq_of_out, dk_of_out,
        dv_of_out without the statistic's. Key 0 is the sink.
    """
    group, length, dim = q.shape
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v, dout = (x.to(dtype) for x in (q, k, v, dout))
    rows = max(1, BLOCK_ELEMENTS // (group * length))
    # of everything, and of out alone
    sums = {name: k.new_zeros(length, dim, dtype=wide) for name in ("dk", "dv", "dk_of_out", "dv_of_out")}
    column_mass = q.new_zeros(group, length, dtype=wide)
    parts = {name: [] for name in ("out", "sink_mass", "lse", "dq", "dq_of_out")}
    key = torch.arange(length, device=q.device)
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        high = stop if causal else length
        low = max(0, start - left) if left >= 0 else 0
        leaves = tuple(x.detach().requires_grad_() for x in (q[:, start:stop], k[low:high], v[low:high]))
        with torch.enable_grad():
            s = (leaves[0] @ leaves[1].T) * scale
            row = torch.arange(start, stop, device=q.device)[:, None]
            hidden = key[None, low:high] > row if causal else torch.zeros_like(row, dtype=torch.bool)
            if left >= 0:
                hidden = hidden | (key[None, low:high] < row - left)
            s = s.masked_fill(hidden, float("-inf")).to(wide)
            p = torch.softmax(s, -1).to(dtype)
            out = p @ leaves[2]
            sink_mass = (p[..., 0] if low == 0 else torch.zeros_like(p[..., 0])).to(wide)
            upstream = (dout[:, start:stop], dsink_mass[:, start:stop].to(wide))
            # a block that does not reach key 0 has no sink mass to differentiate
            seen = 2 if low == 0 else 1
            grads = {
                "": torch.autograd.grad((out, sink_mass)[:seen], leaves, upstream[:seen], retain_graph=True),
                "_of_out": torch.autograd.grad(out, leaves, upstream[0]),
            }
        for name, value in (("out", out), ("sink_mass", sink_mass), ("lse", torch.logsumexp(s, -1))):
            parts[name].append(value.detach())
        for kind, (dq, dk, dv) in grads.items():
            parts["dq" + kind].append(dq)
            sums["dk" + kind][low:high] += dk
            sums["dv" + kind][low:high] += dv
        column_mass[:, low:high] += p.detach().sum(1, dtype=wide)
    done = {name: torch.cat(values, 1) for name, values in parts.items()}
    return {**done, "column_mass": column_mass, **{name: total.to(dtype) for name, total in sums.items()}}


@dataclass(frozen=True)
class Group:
    """Sequence and key head, fp64 results, and the largest error of plain PyTorch by name."""

    sequence: int
    kv_head: int
    truth: dict
    baseline: dict


class Truth:
    """What any implementation of `problem` must return, for a choice of head groups.

    Attributes:
        groups: list of Group.
        total: number of groups there are.
    """

    def __init__(self, problem):
        self.case = problem.case
        sequences, heads = range(len(self.case.lengths)), range(self.case.heads.kv_heads)
        everything = [(b, h) for b in sequences for h in heads]
        self.total = len(everything)
        self.groups = [self._group(problem, b, h) for b, h in spread(everything, self._affordable(problem.q.device))]

    def _affordable(self, device):
        # forward and backward, twice: fp64 and the baseline; every row block is a full rectangle
        heads = self.case.heads
        cost = 2 * 24 * heads.head_dim * max(self.case.lengths) ** 2 * heads.heads // heads.kv_heads
        return max(1, min(MAX_GROUPS, int(BUDGET[device.type] // cost)))

    def _group(self, problem, sequence, kv_head):
        tensors = {name: getattr(problem, name) for name in ("q", "k", "v", "dout", "dsink_mass")}
        arguments = [pick(self.case, name, x.detach(), sequence, kv_head) for name, x in tensors.items()]
        options = (self.case.softmax_scale, self.case.causal, self.case.left)
        truth = attention_in_blocks(*arguments, *options, torch.float64)
        plain = attention_in_blocks(*arguments, *options, self.case.torch_dtype)
        errors = {name: _largest(plain[name].double() - value) for name, value in truth.items()}
        return Group(sequence, kv_head, truth, errors)

    def errors(self, results, factor=2.0, exact_statistics=True):
        """Error over allowed error of each result, the largest of all groups; at most 1 is right, nan is inf.

        Gradients of an implementation without sink_mass are those of out alone.

        Args:
            results: name -> tensor in bthd order: out, dq, dk, dv; sink_mass, lse [B, H, T]; column_mass [B, H, T];
                column_mean [B, T], the mean of column_mass over heads and rows.
        """
        ratios = {}
        kind = "" if "sink_mass" in results else "_of_out"
        for name, result in results.items():
            if name == "column_mean":
                ratios[name] = self._column_mean_error(result)
                continue
            error, plain, size = 0.0, 0.0, 0.0
            for group in self.groups:
                wanted = name + kind if name in GRADIENTS else name
                truth = group.truth[wanted]
                got = pick(self.case, name, result, group.sequence, group.kv_head).double()
                strict = name == "lse" or (name in ("sink_mass", "column_mass") and exact_statistics)
                if strict:
                    relative, absolute = STATISTIC_TOLERANCE
                    # a sum over rows: its roundings add up
                    absolute *= truth.shape[-1] ** 0.5 if name == "column_mass" else 1.0
                    ratio = _largest((got - truth).abs() / (relative * truth.abs() + absolute))
                    ratios[name] = max(ratios.get(name, 0.0), ratio)
                    continue
                error = max(error, _largest(got - truth))
                plain, size = max(plain, group.baseline[wanted]), max(size, _largest(truth))
                ratios[name] = error / self._allowed(factor * plain, size)
        return ratios

    def _allowed(self, error, size):
        """Largest error by the 2x rule; in fp32, where plain PyTorch is right to a few bits, the tests' tolerance."""
        allowed = error + torch.finfo(self.case.torch_dtype).eps * size
        return max(allowed, 3e-6 * size + 5e-6) if self.case.torch_dtype == torch.float32 else allowed

    def _column_mean_error(self, result):
        relative, absolute = COLUMN_MEAN_TOLERANCE
        if len(self.groups) < self.total:
            raise ValueError("column_mean needs every head, and this problem is too large to check them all")
        worst = 0.0
        for b, length in enumerate(self.case.lengths):
            masses = [group.truth["column_mass"] for group in self.groups if group.sequence == b]
            truth = torch.cat(masses).mean(0) / length
            error = (result[b, :length].double() - truth).abs()
            worst = max(worst, _largest(error / (relative * truth + absolute)))
        return worst


def _largest(x):
    """The largest magnitude as a float; inf when anything is nan."""
    value = x.abs().max().item()
    return value if value == value else float("inf")


def spread(items, count):
    """At most `count` of `items`, evenly spaced, first and last among them (one: the last)."""
    if count >= len(items):
        return items
    if count == 1:
        return items[-1:]
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def pick(case, name, x, sequence, kv_head):
    """The part of a tensor in bthd order that belongs to a sequence and a key head: [G, T, ...] or [T, D]."""
    group = case.heads.heads // case.heads.kv_heads
    query_heads = slice(kv_head * group, (kv_head + 1) * group)
    if case.kind == "packed":
        rows = slice(case.starts[sequence], case.starts[sequence + 1])
    else:
        x, rows = x[sequence], slice(0, case.lengths[sequence])
    if name in ("k", "v", "dk", "dv"):
        return x[rows, kv_head]
    if name in ("q", "out", "dout", "dq"):
        return x[rows, query_heads].transpose(0, 1)
    return x[query_heads, rows]
