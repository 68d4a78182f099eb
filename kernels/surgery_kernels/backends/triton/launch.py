"""From AttnInputs to a kernel launch: pointers, strides, flags. The kernels' argument names are the keys."""

from dataclasses import dataclass, replace

import torch
from triton import knobs

from .configs import TileConfig, chunks

LOG2E = 1.4426950408889634
# offsets inside a tile are 32-bit, and no tile has more rows or channels than this
LARGEST_TILE = 256


@dataclass(frozen=True)
class Launch:
    """A kernel with everything that it is called with.

    Attributes:
        kernel: the triton.jit function.
        name: "fwd", "dkdv", "dq", ...
        args: keyword arguments; `n_blocks` and the batch and heads give the grid.
        config: TileConfig.
        heads: programs a sequence and block of rows, default `n_heads`.
    """

    kernel: object
    name: str
    args: dict
    config: TileConfig
    heads: int | None = None

    @property
    def grid(self):
        heads = self.args["n_heads"] if self.heads is None else self.heads
        return (self.args["n_blocks"] * heads * self.args["batch"],)

    @property
    def kernel_args(self):
        return {name: value for name, value in self.args.items() if name in self.kernel.arg_names}

    @property
    def options(self):
        config = self.config
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        if config.max_registers:
            options["maxnreg"] = config.max_registers
        if config.register_usage != TileConfig.register_usage:
            level = f"--register-usage-level={config.register_usage}"
            # beside what the environment tells ptxas (PTXAS_OPTIONS), which an option of ours would replace
            options["ptx_options"] = " ".join(filter(None, (knobs.nvidia.ptxas_options, level)))
        return options

    def run(self):
        """Launch on the current stream of the tensors' device; nothing to do is no launch."""
        if 0 in self.grid:
            return
        device = self.args["device"]
        if device.type != "cuda":
            self.kernel[self.grid](**self.kernel_args, **self.options)
            return
        with torch.cuda.device(device):
            self.kernel[self.grid](**self.kernel_args, **self.options)


def prepare(inputs):
    """(inputs with a positive scale and tiles that 32-bit offsets reach, sign of the scale).

    The running maximum is taken on raw products, which needs scale > 0. A negative or zero scale moves its sign
    (or zero) into a copy of q; dq then takes it too.
    """
    scale = inputs.softmax_scale
    sign = (scale > 0) - (scale < 0)
    q, k, v = (narrow(x) for x in (inputs.q, inputs.k, inputs.v))
    if sign != 1:
        q, scale = q * sign, abs(scale) or 1.0
    return replace(inputs, q=q, k=k, v=v, softmax_scale=scale), sign


def narrow(x):
    """x, or a contiguous copy when a tile of it spans 2^31 elements."""
    span = LARGEST_TILE * (abs(x.stride(-3)) + abs(x.stride(-1)))
    return x if span < 2**31 else x.contiguous()


def empty_rows(inputs, *lead):
    """Unwritten fp32 rows [*lead, B, H, Tq] (packed: [*lead, H, total_q])."""
    return inputs.q.new_empty((*lead, *inputs.rows_shape), dtype=torch.float32)


def problem_args(inputs, config, **tensors):
    """The arguments that every kernel shares, and for each of `tensors` its pointer and strides.

    The strides of rows and channels are constants of the compiled kernel: they belong to the model, not to the
    batch, and as constants they turn a tile's addresses into one register and immediates.

    Returns:
        dict; a kernel takes the ones that it names.
    """
    q = inputs.q
    packed = inputs.is_varlen
    left, right = inputs.window_bounds
    head_dim = q.shape[-1]
    d0, d1 = chunks(head_dim)
    softcap = inputs.softcap
    rows = inputs.rows_shape
    args = {
        "device": q.device,
        "batch": inputs.cu_seqlens_q.shape[0] - 1 if packed else q.shape[0],
        "seq": (
            inputs.cu_seqlens_q,
            inputs.cu_seqlens_k,
            inputs.leftpad_k,
            inputs.seqused_q,
            inputs.seqused_k,
        ),
        "sinks_ptr": None if inputs.sinks is None else inputs.sinks.contiguous(),
        "row_strides": (0 if packed else rows[1] * rows[-1], rows[-1]),
        "total_q": q.shape[0] if packed else q.shape[1],
        "total_k": inputs.k.shape[0] if packed else inputs.k.shape[1],
        "n_heads": q.shape[-2],
        "group": q.shape[-2] // inputs.k.shape[-2],
        "left": left,
        "right": right,
        "scale": inputs.softmax_scale,
        "scale2": (softcap or inputs.softmax_scale) * LOG2E,
        "cap_scale": inputs.softmax_scale / softcap if softcap else 0.0,
        "HAS_LEFT": left >= 0,
        "HAS_RIGHT": right >= 0,
        "HAS_SOFTCAP": softcap > 0,
        "N_SINKS": inputs.n_sinks,
        "D0": d0,
        "D1": d1,
        "D": head_dim,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    for name, x in tensors.items():
        stride_b, stride_t, stride_h, stride_d = (0,) * 4 if x is None else ((0,) * packed + x.stride())
        args[f"{name}_ptr"] = x
        args[f"{name}_strides"] = (stride_b, stride_h)
        args[f"{name.upper()}_STEPS"] = (stride_t, stride_d)
    return args
