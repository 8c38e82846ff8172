"""transformers' attention, with a kernel of this package for the steps that generate.

With one new token a sequence, PyTorch's kernels either repeat the cache for every query head or run
on as many multiprocessors as there are key heads. Everything else is left to transformers' own
``sdpa``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sparse_bitnet.kernels.decode_attention import decode_attention

ATTENTION = "sparse_bitnet"


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: ``[batch, heads, tokens, head_dim]`` → ``[batch, tokens, …]``."""
    bool_or_none = attention_mask is None or attention_mask.dtype.itemsize == 1
    simple = not options.get("dropout") and options.get("position_bias") is None
    simple = simple and value.shape[-1] == query.shape[-1]  # latent attention has narrower values
    simple = simple and query.dtype == key.dtype == value.dtype  # autocast lets them differ
    if query.shape[2] != 1 or not (bool_or_none and simple):
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return result
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    y = decode_attention(query, key, value, attention_mask, scale)
    return y.transpose(1, 2), None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, AttentionMaskInterface()["sdpa"])
