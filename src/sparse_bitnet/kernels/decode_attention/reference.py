"""The definition, through PyTorch's own attention."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def decode_attention(
    query: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None, scale: float
) -> Tensor:
    """Query heads that share a key head are handed over as several queries of one head.

    So keys and values are read once instead of being repeated for every query head.
    """
    batch, heads, _, width = query.shape
    grouped = query.reshape(batch, keys.shape[1], heads // keys.shape[1], width)
    y = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=seen, scale=scale)
    return y.reshape(batch, heads, 1, width)
