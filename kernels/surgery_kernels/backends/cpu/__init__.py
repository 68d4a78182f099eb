"""CPU attention in O(T) memory: aten's flash kernel where it can do the work, blocks of query rows elsewhere."""

from ...types import Backend
from .. import per_sequence
from . import aten, blocked


def unsupported_reasons(inputs):
    reasons = []
    if inputs.q.device.type != "cpu":
        reasons.append(f"runs on cpu, got {inputs.q.device}")
    return reasons


def _path(inputs):
    return aten if aten.can_run(inputs) else blocked


def _dense_forward(inputs):
    return _path(inputs).forward(inputs)


def _dense_backward(inputs, *rows_and_grads):
    return _path(inputs).backward(inputs, *rows_and_grads)


def forward(inputs):
    if inputs.is_varlen:
        return per_sequence.forward(inputs, _dense_forward)
    return _dense_forward(inputs)


def backward(inputs, out, lse, stats, dout, dlse, dstats):
    if inputs.is_varlen:
        return per_sequence.backward(inputs, _dense_backward, out, lse, stats, dout, dlse, dstats)
    return _dense_backward(inputs, out, lse, stats, dout, dlse, dstats)


BACKEND = Backend("cpu", "CPU, O(T) memory, on aten's flash attention", unsupported_reasons, forward, backward)
