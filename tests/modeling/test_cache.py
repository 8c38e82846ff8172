"""Caches against transformers' own."""

import torch
from transformers import MistralConfig, Qwen2Config
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from sparse_bitnet.modeling import KeyValueCache, StaticKeyValueCache
from sparse_bitnet.modeling.cache import GrowingLayer

CONFIG = Qwen2Config(
    num_hidden_layers=1, hidden_size=32, num_attention_heads=4, num_key_value_heads=2
)


def same(one, other):
    return all(
        torch.equal(getattr(one.layers[0], name), getattr(other.layers[0], name))
        for name in ("keys", "values")
    )


def test_whatever_is_done_to_it(monkeypatch):
    monkeypatch.setattr("sparse_bitnet.modeling.cache.SPARE_TOKENS", 4)
    ours, theirs = KeyValueCache(CONFIG), DynamicCache(config=CONFIG)
    generator = torch.Generator().manual_seed(0)
    batch = 3
    for turn in range(200):
        choice = int(torch.randint(0, 8, (), generator=generator))
        length = theirs.get_seq_length()
        for cache in (ours, theirs):
            if choice == 5 and length > 2:
                cache.crop(-2)
            elif choice == 6 and length:
                cache.reorder_cache(torch.arange(batch).flip(0))
            elif choice == 7 and turn % 3 == 0:
                cache.reset()
        if choice < 5:
            keys, values = torch.randn(2, batch, 2, 1 + turn % 3, 8)
            found = ours.update(keys, values, 0)
            expected = theirs.update(keys, values, 0)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(2, 0) == theirs.get_mask_sizes(2, 0)
        if theirs.get_seq_length():
            assert same(ours, theirs)


def test_the_batch_changes():
    ours, theirs = KeyValueCache(CONFIG), DynamicCache(config=CONFIG)
    for change in (None, 2, torch.tensor([0, 3]), torch.tensor([1])):
        keys, values = torch.randn(2, theirs.layers[0].keys.shape[0] if change is not None else 2,
                                   2, 3, 8)  # fmt: skip
        for cache in (ours, theirs):
            cache.update(keys, values, 0)
            if isinstance(change, int):
                cache.batch_repeat_interleave(change)
            elif change is not None:
                cache.batch_select_indices(change)
        assert same(ours, theirs)


def test_tokens_are_not_copied():
    cache = KeyValueCache(CONFIG)
    cache.update(*torch.randn(2, 1, 2, 5, 8), 0)
    places = set()
    for _ in range(9):
        cache.update(*torch.randn(2, 1, 2, 1, 8), 0)
        places.add(cache.layers[0].keys.data_ptr())
    assert len(places) == 1


def test_made_in_inference_mode_and_used_outside():
    cache = KeyValueCache(CONFIG)
    with torch.inference_mode():
        cache.update(*torch.randn(2, 1, 2, 5, 8), 0)
    keys, _ = cache.update(*torch.randn(2, 1, 2, 1, 8), 0)
    assert keys.shape == (1, 2, 6, 8)


def test_gradients_pass_through():
    cache = KeyValueCache(CONFIG)
    keys = torch.randn(1, 2, 5, 8, requires_grad=True)
    found, _ = cache.update(keys, torch.randn(1, 2, 5, 8), 0)
    found.sum().backward()
    assert torch.equal(keys.grad, torch.ones_like(keys))


def test_windows_are_transformers_own():
    config = MistralConfig(num_hidden_layers=2, sliding_window=4)
    kinds = {type(layer) for layer in KeyValueCache(config).layers}
    assert kinds == {DynamicSlidingWindowLayer}
    assert {type(layer) for layer in KeyValueCache(CONFIG).layers} == {GrowingLayer}


def test_a_static_cache_stays_where_it_is():
    cache = StaticKeyValueCache(CONFIG, 2, 8, torch.bfloat16, "cpu")
    place = cache.layers[0].keys.data_ptr()
    first, second = torch.randn(2, 2, 2, 3, 8).bfloat16()
    cache.update(first, first, 0)
    assert cache.get_seq_length() == 0
    cache.advance(3)
    keys, _ = cache.update(second, second, 0)
    assert torch.equal(keys[:, :, :6], torch.cat([first, second], 2))
    assert keys.data_ptr() == place and cache.length == 8
    assert cache.is_compileable and cache.get_mask_sizes(1, 0) == (8, 0)
