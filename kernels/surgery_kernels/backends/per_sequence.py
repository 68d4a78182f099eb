"""Packed batches for a backend that has no packed kernel: one dense call a sequence."""

import torch


def forward(inputs, dense_forward):
    """Run `dense_forward` on each sequence of packed `inputs` and pack its results."""
    out = torch.zeros_like(inputs.q, memory_format=torch.contiguous_format)
    lse = torch.full(inputs.rows_shape, float("-inf"), dtype=inputs.rows_dtype, device=out.device)
    stats = lse.new_zeros(len(inputs.stats), *lse.shape)
    for of_q, _, one in inputs.unpack():
        out_one, lse_one, stats_one = dense_forward(one)
        out[of_q], lse[:, of_q], stats[:, :, of_q] = out_one[0], lse_one[0], stats_one[:, 0]
    return out, lse, stats


def backward(inputs, dense_backward, out, lse, stats, dout, dlse, dstats):
    """Run `dense_backward` on each sequence of packed `inputs` and pack dq, dk, dv."""
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (inputs.q, inputs.k, inputs.v))
    for of_q, of_k, one in inputs.unpack():
        dq_one, dk_one, dv_one = dense_backward(
            one,
            out[None, of_q],
            lse[None, :, of_q],
            stats[:, None, :, of_q],
            None if dout is None else dout[None, of_q],
            None if dlse is None else dlse[None, :, of_q],
            None if dstats is None else dstats[:, None, :, of_q],
        )
        dq[of_q], dk[of_k], dv[of_k] = dq_one[0], dk_one[0], dv_one[0]
    return dq, dk, dv
