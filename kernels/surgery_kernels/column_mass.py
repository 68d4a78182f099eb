"""Total attention that each key receives: finds the paper's sink token (eq. 1) in O(T) memory."""

import torch

from .backends import triton
from .types import AttnInputs

BLOCK = 256
# scores of a block, all heads together: 32 MiB in fp32, however long the sequence
MAX_SCORES = 2**23


def column_mass(inputs: AttnInputs, lse):
    """Attention summed over a sequence's query rows, per head and key; no gradient.

        column_mass[b, h, j] = sum_i p_ij

    Args:
        inputs: dense AttnInputs, see `make_inputs`.
        lse: [B, H, Tq] of the same problem, from `flash_attn_stats`; rows that see no key hold -inf and count 0.
    Returns:
        [B, H, Tk] fp32.
    Raises:
        ValueError: packed inputs.
    """
    if inputs.is_varlen:
        raise ValueError("column_mass takes dense inputs [B, T, H, D], got packed ones")
    with torch.no_grad(), torch.autocast(inputs.q.device.type, enabled=False):
        if inputs.q.is_cuda and not triton.unsupported_reasons(inputs):
            return triton.column_mass(inputs, lse)
        return _column_mass(inputs, lse)


def _column_mass(inputs, lse):
    batch, len_q, n_heads, _ = inputs.q.shape
    len_k, n_kv = inputs.k.shape[1:3]
    # bf16 scores would be off by 2^-9 of themselves against an lse that is not
    q, k = inputs.q.transpose(1, 2).float(), inputs.k.transpose(1, 2).float()
    mass = torch.zeros(batch, n_heads, len_k, dtype=torch.float32, device=q.device)
    shift = torch.zeros(batch, dtype=torch.long, device=q.device)
    first = shift if inputs.leftpad_k is None else inputs.leftpad_k.long()
    used_k = shift + len_k if inputs.seqused_k is None else inputs.seqused_k.long()
    shift = used_k - (len_q if inputs.seqused_q is None else inputs.seqused_q.long())
    left, right = inputs.window_bounds
    key = torch.arange(len_k, device=q.device)[None, None, :]
    real = (key >= first[:, None, None]) & (key < used_k[:, None, None])
    block = max(1, min(BLOCK, MAX_SCORES // max(1, batch * n_heads * len_k)))
    for start in range(0, len_q, block):
        rows = slice(start, min(start + block, len_q))
        q_block = q[:, :, rows].unflatten(1, (n_kv, -1)).flatten(2, 3)
        s = torch.matmul(q_block, k.transpose(-1, -2)) * inputs.softmax_scale
        s = s.view(batch, n_heads, rows.stop - rows.start, len_k)
        if inputs.softcap:
            s = inputs.softcap * torch.tanh(s / inputs.softcap)
        position = torch.arange(rows.start, rows.stop, device=q.device)[None, :, None] + shift[:, None, None]
        visible = real
        if right >= 0:
            visible = visible & (key <= position + right)
        if left >= 0:
            visible = visible & (key >= position - left)
        lse_block = lse[:, :, rows, None].float()
        visible = visible[:, None] & (lse_block != float("-inf"))
        mass += torch.exp(torch.where(visible, s - lse_block, float("-inf"))).sum(2)
    return mass
