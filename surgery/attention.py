"""The attention and mask functions that Hugging Face models call under the name `surgery`.

The mask function runs once a forward and returns what every layer then gets as `attention_mask`: None (nothing to
mask but causality), int32 [B, 1, 1, 2] bounds of a padded batch, int32 [1, 1, N + 1, 1] cu_seqlens of a packed one, or
the bool [B, 1, Tq, Tk] mask of sdpa for calls with a cache and anything the kernels cannot express. All have four
dimensions because transformers hands masks through it a second time (generate prepares them for static caches) and
leaves only 4-D ones alone.
"""

import surgery_kernels as sk
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .masks import packed_cu_seqlens, padding_bounds, sequence_starts
from .probe import penalty_attention
from .versions import query_rows

NAME = "surgery"
# arguments that change attention's mathematics and that the kernels do not have
UNSUPPORTED = ("s_aux", "position_bias", "alibi", "head_mask", "learnable_sink")


def register():
    """Make `attn_implementation="surgery"` known to transformers: attention and mask function."""
    AttentionInterface.register(NAME, surgery_attention)
    # without a mask function of the same name transformers drops the padding mask, silently
    AttentionMaskInterface.register(NAME, surgery_mask)


def surgery_mask(
    batch_size,
    kv_length,
    kv_offset=0,
    mask_function=None,
    attention_mask=None,
    allow_is_causal_skip=True,
    use_vmap=False,
    **query,
):
    """What the layers get as `attention_mask`, see the module's docstring. Keywords: transformers' mask functions."""
    q_length, device, whole = query_rows(kv_length, kv_offset, query)
    if not whole or use_vmap:
        return sdpa_mask(
            batch_size=batch_size,
            kv_length=kv_length,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=allow_is_causal_skip,
            use_vmap=use_vmap,
            **query,
        )
    if attention_mask is not None:
        return padding_bounds(attention_mask[:, -kv_length:].bool())[:, None, None]
    if allow_is_causal_skip or q_length == 1:
        return None
    # transformers found position_ids that restart (or is tracing and cannot tell; 4.57 never looks)
    return packed_cu_seqlens(sequence_starts(mask_function, batch_size, q_length, device))[None, None, :, None]


def surgery_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    softcap=None,
    sliding_window=None,
    is_causal=None,
    surgery_ctx=None,
    **kwargs,
):
    """Attention of one layer. Signature of transformers' attention functions.

    Args:
        module: the attention module; its `layer_idx` says where a probe records.
        query: [B, H, T, D]; key, value: [B, H_kv, S, D].
        attention_mask: what `surgery_mask` returned.
        surgery_ctx: a `Probe`, or None.
    Returns:
        out [B, T, H, D] contiguous, None.
    Raises:
        ValueError: dropout, a learned sink or another option that the kernels do not have; a probe on a call with
            a cache, packed rows or a 4-D mask.
    """
    _check_options(module, dropout, kwargs)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    bounds, cu_seqlens, full_mask = _read_mask(attention_mask)
    if full_mask or query.shape[2] != key.shape[2]:
        if surgery_ctx is not None:
            raise ValueError(
                "a probe needs plain self-attention: no cache (use_cache=False) and a [B, T] attention_mask"
            )
        if bounds is not None or cu_seqlens is not None:
            raise RuntimeError(f"a mask of {query.shape[2]} rows came with {key.shape[2]} keys: no mask for a cache")
        return _cached_attention(module, query, key, value, attention_mask, scaling, softcap, causal)
    options = {
        "softmax_scale": scaling,
        "causal": causal,
        # transformers counts the query itself: W keys are the query and W - 1 on its left
        "window_size": (-1, -1) if sliding_window is None else (sliding_window - 1, -1),
        "softcap": softcap or 0.0,
    }
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    backend = getattr(module, "_surgery_backend", "auto")
    if surgery_ctx is not None:
        if cu_seqlens is not None:
            raise ValueError("a probe takes padded batches with an attention_mask, not packed rows")
        attend = _probed if surgery_ctx.split is None else surgery_ctx.split.attention
        return attend(surgery_ctx, module, q, k, v, options, backend), None
    if kwargs.get("cu_seq_lens_q") is not None or cu_seqlens is not None:
        return _packed(q, k, v, cu_seqlens, options, backend, kwargs), None
    return sk.flash_attn_stats(q, k, v, **options, stats=(), **_lengths(bounds), backend=backend).out, None


def _check_options(module, dropout, kwargs):
    if dropout:
        raise ValueError(
            f"attention dropout must be 0 with surgery attention, got {dropout}: set config.attention_dropout = 0.0"
        )
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__} passes {name}, which surgery attention does not support")


def _read_mask(attention_mask):
    """(bounds int32 [B, 2] or None, cu_seqlens int32 [N + 1] or None, whether it is a full mask)."""
    if attention_mask is None:
        return None, None, False
    if attention_mask.dim() == 2:
        # from a model that bypasses transformers' mask functions
        return padding_bounds(attention_mask.bool()), None, False
    if attention_mask.dtype != torch.int32:
        return None, None, True
    if attention_mask.shape[-1] == 2:
        return attention_mask[:, 0, 0], None, False
    return None, attention_mask[0, 0, :, 0].contiguous(), False


def _lengths(bounds):
    """flash_attn_stats' padding arguments of bounds [B, 2] or None."""
    if bounds is None:
        return {}
    first, end = (x.contiguous() for x in bounds.unbind(1))
    return {"leftpad_k": first, "seqused_q": end, "seqused_k": end}


def _packed(q, k, v, cu_seqlens, options, backend, kwargs):
    batch, length = q.shape[:2]
    cu_q, cu_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if cu_q is None:
        cu_q = cu_k = cu_seqlens
        longest_q = longest_k = length
    else:
        cu_q, cu_k = (x.to(device=q.device, dtype=torch.int32) for x in (cu_q, cu_q if cu_k is None else cu_k))
        longest_q, longest_k = kwargs.get("max_length_q") or length, kwargs.get("max_length_k") or length
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    out = sk.flash_attn_stats_varlen(
        q, k, v, cu_q, cu_k, int(longest_q), int(longest_k), **options, stats=(), backend=backend
    )
    return out.out.unflatten(0, (batch, length))


def _probed(probe, module, q, k, v, options, backend):
    layer = module.layer_idx
    sinks = probe.n_sinks if probe.sinks is None else probe.sinks
    lengths = _lengths(probe.bounds)
    if probe.kind == "penalty":
        inputs = sk.make_inputs(q, k, v, **options, sinks=sinks, **lengths)
        out, rows = penalty_attention(
            probe, layer, inputs.q, inputs.k, inputs.v, inputs, sk.choose_backend(inputs, backend)
        )
    elif probe.kind == "mass":
        result = sk.flash_attn_stats(q, k, v, **options, sinks=sinks, **lengths, backend=backend)
        out, rows = result.out, result.stats["sink_mass"]
    elif probe.kind == "stats":
        result = sk.flash_attn_stats(q, k, v, **options, sinks=sinks, stats=probe.stats, **lengths, backend=backend)
        out, rows = result.out, result.stats
    else:
        result = sk.flash_attn_stats(q, k, v, **options, sinks=0, stats=(), **lengths, backend=backend)
        out = result.out
        rows = sk.column_mass(sk.make_inputs(q, k, v, **options, sinks=0, **lengths), result.lse)
    probe.record(layer, rows)
    return out


def _cached_attention(module, query, key, value, attention_mask, scaling, softcap, causal):
    """Decoding and other calls with a cache: torch's own attention, exact with any mask."""
    len_q = query.shape[2]
    # a lone row sees the whole cache; transformers 4.57 takes is_causal at its word
    causal = causal and attention_mask is None and len_q > 1
    if not softcap:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=0.0, scaling=scaling, is_causal=causal
        )
    # torch's kernels have no softcap
    if causal:
        # sdpa_mask leaves the mask out for a first call with an empty static cache: only the first keys are real
        key, value = key[:, :, :len_q], value[:, :, :len_q]
        attention_mask = torch.ones(len_q, len_q, dtype=torch.bool, device=query.device).tril()
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    s = torch.matmul(query, key.transpose(-1, -2)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    s = softcap * torch.tanh(s / softcap)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        s = s.masked_fill(~attention_mask, torch.finfo(s.dtype).min)
    elif attention_mask is not None:
        s = s + attention_mask
    p = torch.softmax(s, -1, dtype=torch.float32).to(value.dtype)
    return torch.matmul(p, value).transpose(1, 2).contiguous(), None
