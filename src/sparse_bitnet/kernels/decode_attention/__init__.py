"""Attention of one new token a sequence over a static key-value cache."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bitnet.kernels.decode_attention import reference
from sparse_bitnet.kernels.library import register
from sparse_bitnet.kernels.platform import runs_triton

__all__ = ["decode_attention"]


def decode_attention(
    query: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None, scale: float
) -> Tensor:
    """softmax(scale · q·Kᵀ where seen) · V, for one query a sequence and head.

    Args:
        query: ``[batch, heads, 1, head_dim]``, float.
        keys, values: ``[batch, key heads, length, head_dim]`` of the same dtype; the number of key
            heads divides that of heads.
        seen: bool ``[batch or 1, 1, 1, length]``, True where a key counts; None for all. Every
            sequence has to see at least one key.
        scale: of the scores.

    Returns:
        ``[batch, heads, 1, head_dim]``.
    """
    if not runs_triton(query):
        return reference.decode_attention(query, keys, values, seen, scale)
    result: Tensor = torch.ops.sparse_bitnet.decode_attention(query, keys, values, seen, scale)
    return result


def _cuda(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    from sparse_bitnet.kernels.decode_attention import triton

    return triton.attend(query, keys, values, seen, scale)


def _fake(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    return query.new_empty(query.shape)


register(
    "decode_attention(Tensor query, Tensor keys, Tensor values, Tensor? seen, float scale) "
    "-> Tensor",
    _cuda,
    _fake,
)
