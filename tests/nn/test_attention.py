"""The attention that generates: the same tokens as transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from sparse_bitnet.nn.attention import ATTENTION, attend


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generates_the_same(
    tiny: Callable[..., PreTrainedModel], architecture: str, cache: str
) -> None:
    model: Any = tiny(architecture).eval()
    tokens = torch.randint(0, 64, (2, 5))
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    before = model.generate(tokens, **options)
    model.set_attn_implementation(ATTENTION)
    after = model.generate(tokens, **options)
    assert torch.equal(before.sequences, after.sequences)
    torch.testing.assert_close(torch.stack(after.logits), torch.stack(before.logits))


def test_values_narrower_than_keys_are_left_to_sdpa() -> None:
    query, keys = torch.randn(2, 4, 1, 24), torch.randn(2, 4, 7, 24)
    values = torch.randn(2, 4, 7, 16)
    module = nn.Module().eval()
    module.is_causal = True  # type: ignore[assignment]
    y, _ = attend(module, query, keys, values, None, scaling=0.3)
    expected = F.scaled_dot_product_attention(query, keys, values, scale=0.3)
    torch.testing.assert_close(y, expected.transpose(1, 2))


def test_dtypes_that_autocast_mixes_are_left_to_sdpa() -> None:
    """Queries and keys that rotations in float32 made float32, values in bf16."""
    query, keys = torch.randn(2, 4, 1, 16), torch.randn(2, 4, 7, 16)
    values = torch.randn(2, 4, 7, 16).bfloat16()
    module = nn.Module().eval()
    module.is_causal = True  # type: ignore[assignment]
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = attend(module, query, keys, values, None)
        expected = F.scaled_dot_product_attention(query, keys, values)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected.transpose(1, 2))


@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_masks_and_scales(scaling: float | None, mask: str | None) -> None:
    query, keys, values = (
        torch.randn(2, 4, 1, 16),
        torch.randn(2, 2, 7, 16),
        torch.randn(2, 2, 7, 16),
    )
    seen = None if mask is None else torch.rand(2, 1, 1, 7) < 0.5
    if seen is not None:
        seen[..., 0] = True
    if mask == "float":
        seen = torch.randn(2, 1, 1, 7)  # added to the scores, as a bias of positions is
    module = nn.Module().eval()
    module.is_causal, module.num_key_value_groups = True, 2  # type: ignore[assignment]
    y, _ = attend(module, query, keys, values, seen, scaling=scaling)
    repeated = [tensor.repeat_interleave(2, 1) for tensor in (keys, values)]
    expected = F.scaled_dot_product_attention(query, *repeated, attn_mask=seen, scale=scaling)
    torch.testing.assert_close(y, expected.transpose(1, 2))


def test_padding_is_not_seen(tiny: Callable[..., PreTrainedModel]) -> None:
    model: Any = tiny().eval()
    tokens = torch.randint(0, 64, (2, 6))
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    before = model.generate(tokens, **options)
    model.set_attn_implementation(ATTENTION)
    assert torch.equal(model.generate(tokens, **options), before)
