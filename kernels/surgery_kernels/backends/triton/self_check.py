"""Each configuration, once on each device, against plain torch: compilers of several Triton releases are known to
emit wrong code for attention kernels without a word (register operands of wgmma on sm_90, for one).

The first call that needs a kernel for a dtype and head dim runs it on one small causal problem and compares in
fp64. A configuration that fails is reported once and the next one is taken. This is the only place of the backend
that waits for the device; it is left out in the interpreter and while a CUDA graph is captured. Set
SURGERY_SELF_CHECK=0 to leave it out altogether.
"""

import logging
import os

import torch

from ...types import AttnInputs
from .backward import dkdv_launch, dq_launch, preprocess_launches, row_buffers
from .forward import forward_launch

logger = logging.getLogger("surgery_kernels")

# largest error allowed, relative to the largest number of the tensor
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

_verified = {}


def checked(kernel, like, candidates):
    """The first of `candidates` that computes correctly.

    Args:
        kernel: one of configs.KERNELS.
        like: q, for its device, dtype and head dim.
        candidates: TileConfigs, best first.
    Raises:
        RuntimeError: none does.
    """
    key = (kernel, like.device, like.dtype, like.shape[-1], tuple(candidates))
    if key in _verified:
        return _verified[key]
    if not _wanted(like):
        return candidates[0]
    _verified[key] = _first_correct(kernel, like, candidates)
    return _verified[key]


def _wanted(like):
    if os.environ.get("SURGERY_SELF_CHECK") == "0" or os.environ.get("TRITON_INTERPRET") == "1":
        return False
    return like.is_cuda and not torch.cuda.is_current_stream_capturing()


def _first_correct(kernel, like, candidates):
    for config in candidates:
        try:
            wrong = {name: error for name, error in errors(kernel, like, config).items() if not error <= 1.0}
        except Exception as failure:
            # whatever the compiler or the driver raises, another configuration may do
            wrong = {type(failure).__name__: failure}
        if not wrong:
            return config
        logger.warning(
            "triton %s kernel, %s, head_dim %d on %s: %s fails its self-check (%s); trying another",
            kernel,
            like.dtype,
            like.shape[-1],
            like.device,
            config,
            ", ".join(f"{name}: {error}" for name, error in wrong.items()),
        )
    raise RuntimeError(
        f"no configuration of the triton {kernel} kernel computes correctly for {like.dtype}, head_dim "
        f"{like.shape[-1]} on {like.device}; tried {list(candidates)}. Use another backend"
    )


def errors(kernel, like, config):
    """name -> error of a kernel's results on a small problem, in units of the tolerance."""
    length = 2 * max(config.block_m, config.block_n) + 17
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, length, 2, like.shape[-1]), *((1, length, 1, like.shape[-1]),) * 2)
    q, k, v = (torch.randn(shape, generator=generator).to(like.device, like.dtype) for shape in shapes)
    dout = torch.randn(q.shape, generator=generator).to(q)
    dstats = torch.randn(1, 1, 2, length, generator=generator).to(q.device)
    inputs = AttnInputs(q, k, v, q.shape[-1] ** -0.5, max_seqlen_q=length, max_seqlen_k=length)
    truth = _eager(inputs, dout, dstats)
    actual = _run_kernel(kernel, inputs, config, truth, dout, dstats)
    unit = TOLERANCE[q.dtype]
    return {
        name: ((x.double() - truth[name]).abs().max() / truth[name].abs().max() / unit).item()
        for name, x in actual.items()
    }


def _eager(inputs, dout, dstats):
    """name -> fp64 results of causal attention written out, one kv head.

    The gradients are written out too: inside a registered operator autograd records nothing.
    """
    q, k, v, do = (x.double() for x in (inputs.q, inputs.k[:, :, 0], inputs.v[:, :, 0], dout))
    s = torch.einsum("bihd,bjd->bhij", q, k) * inputs.softmax_scale
    hidden = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1)
    s = s.masked_fill(hidden, float("-inf"))
    p = torch.softmax(s, -1)
    dp = torch.einsum("bihd,bjd->bhij", do, v)
    dp[..., 0] += dstats[0]
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * inputs.softmax_scale
    return {
        "out": torch.einsum("bhij,bjd->bihd", p, v),
        "lse": torch.logsumexp(s, -1),
        "sink_mass": p[..., 0],
        "dq": torch.einsum("bhij,bjd->bihd", ds, k),
        "dk": torch.einsum("bhij,bihd->bjd", ds, q)[:, :, None],
        "dv": torch.einsum("bhij,bihd->bjd", p, do)[:, :, None],
    }


def _run_kernel(kernel, inputs, config, truth, dout, dstats):
    if kernel == "fwd":
        launch, (out, lse, stats) = forward_launch(inputs, config)
        launch.run()
        return {"out": out, "lse": lse, "sink_mass": stats[0]}
    out, lse = truth["out"].to(dout.dtype), truth["lse"].float()
    rows = row_buffers(inputs, dstats)
    stats = truth["sink_mass"].float()[None]
    for launch in preprocess_launches(inputs, out, lse, stats, dout, None, dstats, rows, config):
        launch.run()
    if kernel == "dq":
        launch, dq = dq_launch(inputs, dout, rows, config)
        launch.run()
        return {"dq": dq}
    dq = torch.zeros(inputs.q.shape, device=inputs.q.device) if kernel == "bwd" else None
    launch, (dk, dv) = dkdv_launch(inputs, dout, rows, config, dq=dq)
    launch.run()
    return {"dk": dk, "dv": dv} | ({} if dq is None else {"dq": dq * inputs.softmax_scale})
