"""What the backend does with a problem: choose configurations, launch, return."""

from .backward import dkdv_launch, dq_launch, preprocess_launches, row_buffers
from .configs import choose
from .forward import forward_launch
from .launch import narrow, prepare


def _config(kernel, inputs):
    return choose(kernel, None, inputs.q.shape[-1], inputs.q.element_size())[0]


def forward(inputs):
    inputs, _ = prepare(inputs)
    launch, results = forward_launch(inputs, _config("fwd", inputs))
    launch.run()
    return results


def backward(inputs, out, lse, stats, dout, dlse, dstats):
    inputs, sign = prepare(inputs)
    dout = None if dout is None else narrow(dout)
    lse, stats, dlse, dstats = (None if x is None else x.contiguous() for x in (lse, stats, dlse, dstats))
    if not inputs.stats:
        dstats = None
    rows = row_buffers(inputs, dstats)
    dq_config = _config("dq", inputs)
    for launch in preprocess_launches(inputs, out, lse, stats, dout, dlse, dstats, rows, dq_config):
        launch.run()
    group = inputs.q.shape[-2] // inputs.k.shape[-2]
    splits = 1
    launch, (dk, dv) = dkdv_launch(inputs, dout, rows, _config("dkdv", inputs), splits)
    launch.run()
    if splits > 1:
        dk, dv = (x.unflatten(-2, (-1, group)).sum(-2).to(inputs.k.dtype) for x in (dk, dv))
    launch, dq = dq_launch(inputs, dout, rows, dq_config)
    launch.run()
    return (dq if sign == 1 else dq * sign), dk, dv
