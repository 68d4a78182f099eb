"""Launches of the CUDA epilogue: from AttnInputs and tensors to the C struct."""

import ctypes

import torch

from .library import DTYPES, SinkParams, TensorRef, load, reason_against

MAX_SINKS = 16
# blocks wanted before one takes more rows: some on every multiprocessor of the largest device
MANY_BLOCKS = 1024


def can_run(inputs):
    """Whether the library serves these inputs on their device."""
    head_dim = inputs.q.shape[-1]
    if inputs.q.device.type != "cuda" or inputs.q.dtype not in DTYPES or inputs.n_sinks > MAX_SINKS:
        return False
    if head_dim % 8 or not 8 <= head_dim <= 256:
        return False
    return reason_against(_arch(inputs)) is None


def _arch(inputs):
    major, minor = torch.cuda.get_device_capability(inputs.q.device)
    return 10 * major + minor


def rows_per_block(batch, n_kv, len_q):
    """Rows a block takes: 32 to 256, by the problem alone, so that sums are added in the same order everywhere."""
    rows = 256
    while rows > 32 and batch * n_kv * -(-len_q // rows) < MANY_BLOCKS:
        rows //= 2
    return rows


def _aligned(x):
    """x, or a copy that can be read 16 bytes at a time."""
    size = x.element_size()
    if x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(step * size % 16 == 0 for step in x.stride()[:-1]):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _ref(x, packed):
    batch, token, head = (0, *x.stride()[:2]) if packed else x.stride()[:3]
    return TensorRef(x.data_ptr(), batch, token, head)


def _call(name, inputs, tensors, rows, written, **numbers):
    """Fill the struct and launch on the current stream.

    Args:
        tensors: name -> [B, T, H, D] or [total, H, D] that is read.
        rows: name -> fp32 rows, contiguous.
        written: name -> tensor that is written.
    """
    packed, q = inputs.is_varlen, inputs.q
    params = SinkParams()
    # `kept` lives until the launch: it may be the only reference to a copy
    kept = {key: _aligned(x) for key, x in tensors.items() if x is not None}
    for key, x in {**kept, **written}.items():
        setattr(params, key, _ref(x, packed))
    lengths = {
        "cu_q": inputs.cu_seqlens_q,
        "cu_k": inputs.cu_seqlens_k,
        "first_key": inputs.leftpad_k,
        "used_q": inputs.seqused_q,
        "used_k": inputs.seqused_k,
        "positions": inputs.sinks,
    }
    for key, x in {**rows, **lengths}.items():
        if x is not None:
            kept[key] = x.contiguous()
            setattr(params, key, kept[key].data_ptr())
    batch = inputs.cu_seqlens_q.shape[0] - 1 if packed else q.shape[0]
    n_kv = inputs.k.shape[-2]
    params.rows_batch = 0 if packed else inputs.rows_shape[1] * inputs.rows_shape[2]
    params.rows_head = inputs.rows_shape[-1]
    params.batch, params.len_q, params.len_k = batch, inputs.max_seqlen_q, inputs.max_seqlen_k
    params.n_heads, params.group, params.head_dim = q.shape[-2], q.shape[-2] // n_kv, q.shape[-1]
    params.n_sinks, params.dtype = inputs.n_sinks, DTYPES[q.dtype]
    params.left, params.right = inputs.window_bounds
    params.scale, params.softcap = inputs.softmax_scale, inputs.softcap
    params.rows_per_block = rows_per_block(batch, n_kv, inputs.max_seqlen_q)
    params.n_splits = -(-inputs.max_seqlen_q // params.rows_per_block)
    for key, x in numbers.items():
        setattr(params, key, x)
    if name == "backward":
        partial = q.new_empty((batch, n_kv, params.n_splits, 2, inputs.n_sinks, q.shape[-1]), dtype=torch.float32)
        params.partial = partial.data_ptr()
    _launch(name, params, inputs)


def _launch(name, params, inputs):
    library = load(_arch(inputs))
    with torch.cuda.device(inputs.q.device):
        stream = torch.cuda.current_stream().cuda_stream
        error = getattr(library, f"surgery_sink_{name}")(ctypes.byref(params), ctypes.c_void_p(stream))
    if error:
        message = library.surgery_error_string(error).decode()
        raise RuntimeError(f"CUDA sink epilogue, {name}: {message} (error {error})")


def sink_mass(inputs, lse):
    """Rows of attention on the sink keys."""
    mass = torch.empty_like(lse)
    _call("forward", inputs, {"q": inputs.q, "k": inputs.k}, {"lse": lse, "sink_mass": mass}, {})
    return mass


def fold(inputs, out, dout, extra, folded_out, folded_dout, first_row=0):
    """Write the adjusted out and dout of the rows from `first_row` on; return delta of all rows."""
    delta = torch.empty_like(extra)
    _call(
        "fold",
        inputs,
        {"out": out, "dout": dout},
        {"extra": extra, "delta": delta},
        {"folded_out": folded_out, "folded_dout": folded_dout},
        folded_first=first_row,
    )
    return delta


def add_sinks(inputs, lse, g, dout, dq_in, dk, dv, *, delta=None, out=None, extra=None, first_row=0):
    """dq [.., Tq, H, D] with the sinks' part added to `dq_in`, which begins at row `first_row` or is None; the rows of
    dk and dv at the sinks are written.

    Args:
        lse, g: rows; g and `extra` are 0 where a row sees no key.
        delta: rows, or `out` and `extra` to make them of.
    """
    dq = inputs.q.new_empty(inputs.q.shape)
    _call(
        "backward",
        inputs,
        {"q": inputs.q, "k": inputs.k, "v": inputs.v, "out": out, "dout": dout, "dq_in": dq_in},
        {"lse": lse, "g": g, "extra": extra, "delta": delta},
        {"dq": dq, "dk": dk, "dv": dv},
        dq_in_first=first_row,
    )
    return dq
