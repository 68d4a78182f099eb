"""Padding masks and packed rows as the few integers a kernel needs, through opaque operators.

They are operators because their checks read values: inside torch.compile an `if` on a tensor breaks the graph.
"""

import torch
from torch import Tensor


@torch.library.custom_op("surgery::padding_bounds", mutates_args=())
def padding_bounds(mask: Tensor) -> Tensor:
    """First real token and the one behind the last of each row.

    Args:
        mask: [B, T] bool, true on real tokens.
    Returns:
        int32 [B, 2]: the real tokens of row b are [first, end); (0, 0) for a row without any.
    Raises:
        ValueError: real tokens of a row are not one contiguous run.
    """
    real = mask.to(torch.int32)
    count = real.sum(1, dtype=torch.int32)
    first = torch.where(count > 0, real.argmax(1), 0).to(torch.int32)
    column = torch.arange(mask.shape[1], device=mask.device, dtype=torch.int32)
    end = torch.where(mask, column + 1, 0).amax(1) if mask.shape[1] else first
    holes = end - first != count
    if holes.any():
        rows = holes.nonzero()[:, 0].tolist()
        raise ValueError(
            f"attention_mask must hold one contiguous run of ones in each row, as left or right padding gives; "
            f"rows {rows[:8]} do not. For packed sequences pass position_ids or cu_seq_lens_q instead of a mask"
        )
    return torch.stack((first, end.to(torch.int32)), 1)


@padding_bounds.register_fake
def _(mask):
    return mask.new_empty((mask.shape[0], 2), dtype=torch.int32)


@torch.library.custom_op("surgery::packed_cu_seqlens", mutates_args=())
def packed_cu_seqlens(starts: Tensor) -> Tensor:
    """Start of each packed sequence in the flattened batch, then the total.

    Args:
        starts: [B, T] bool, true on the first token of each sequence.
    Returns:
        int32 [N + 1].
    """
    total = torch.full((1,), starts.numel(), dtype=torch.int32, device=starts.device)
    return torch.cat((starts.flatten().nonzero()[:, 0].to(torch.int32), total))


@packed_cu_seqlens.register_fake
def _(starts):
    return starts.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.int32)


def sequence_starts(mask_function, batch_size, length, device):
    """[B, T] bool: the tokens that do not see the token before them under `mask_function`.

    Args:
        mask_function: transformers' index form of a mask, (batch, head, query, key) -> bool tensor.
    """
    batch = torch.arange(batch_size, device=device)[:, None]
    query = torch.arange(1, length, device=device)[None, :]
    linked = mask_function(batch, torch.zeros_like(batch), query, query - 1)
    first = torch.ones(batch_size, 1, dtype=torch.bool, device=device)
    return torch.cat((first, ~linked.expand(batch_size, length - 1)), 1)
