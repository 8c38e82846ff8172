import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.cache_utils import DynamicCache, StaticCache

from sparse_bitnet.core import Pattern
from sparse_bitnet.kernels import native
from sparse_bitnet.nn.fuse import fuse
from sparse_bitnet.nn.pack import pack_module
from sparse_bitnet.nn.packed_module import prepare
from sparse_bitnet.nn.single_token import step_in_one_call
from sparse_bitnet.nn.sparse_bit_linear import SparseBitLinear

CONFIGS = (Qwen2Config, Qwen3Config, LlamaConfig, MistralConfig)
pytestmark = pytest.mark.skipif(not native.available(), reason="the CPU kernel was not compiled")


def fused(
    config: type, dtype: torch.dtype, pattern: str = "6:8", **changes: Any
) -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 300,
        "hidden_size": 96,
        "intermediate_size": 200,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
    }
    if config is MistralConfig:
        shape["sliding_window"] = None
    model = AutoModelForCausalLM.from_config(config(**{**shape, **changes}), dtype=dtype)
    model.eval().requires_grad_(False)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.weight += torch.randn_like(module.weight) / 4
    for name, module in list(model.model.layers.named_modules()):
        if type(module) is torch.nn.Linear:
            if module.bias is not None:
                module.bias += torch.randn_like(module.bias)
            trained = SparseBitLinear(module, Pattern.parse(pattern))
            model.model.layers.set_submodule(name, pack_module(trained, "two-bit", name))
    fuse(model)
    prepare(model)
    return model


def served(model: PreTrainedModel) -> list[bool]:
    return [layer._place.stack.call is not None for layer in model.model.layers]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("pattern", ["6:8", "2:4"])
def test_a_step_equals_the_modules(config: type, pattern: str) -> None:
    """In float32 all that differs is the order of sums, unless it turns a rounding over."""
    plain = fused(config, torch.float32, pattern)
    model = copy.deepcopy(plain)
    assert step_in_one_call(model) == 2
    caches = [DynamicCache(config=plain.config) for _ in range(2)]
    prompt = torch.randint(0, 300, (1, 11))
    errors = []
    with torch.inference_mode():
        for step in range(60):
            tokens = torch.randint(0, 300, (1, 1)) if step else prompt
            expected, y = (
                one(tokens, past_key_values=cache).logits
                for one, cache in zip((plain, model), caches, strict=True)
            )
            errors.append(float((y - expected).abs().max() / expected.abs().max()))
            for name in ("keys", "values"):
                one, other = (getattr(cache.layers[1], name) for cache in caches)
                assert one.shape == other.shape
    assert served(model) == [True, True]
    assert errors[0] == 0  # a prompt goes the modules' way
    assert sorted(errors)[len(errors) // 2] < 1e-5
    assert max(errors) < 0.03


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [Qwen2Config, Qwen3Config])
def test_a_step_in_a_half_precision(config: type, dtype: torch.dtype) -> None:
    plain = fused(config, dtype)
    model = copy.deepcopy(plain)
    step_in_one_call(model)
    caches = [DynamicCache(config=plain.config) for _ in range(2)]
    with torch.inference_mode():
        for step in range(20):
            tokens = torch.randint(0, 300, (1, 1 if step else 5))
            expected, y = (
                one(tokens, past_key_values=cache).logits.float()
                for one, cache in zip((plain, model), caches, strict=True)
            )
            assert (y - expected).norm() < 0.03 * expected.norm()
    assert served(model) == [True, True]


@pytest.mark.parametrize("path", native.available())
def test_every_path(path: str) -> None:
    with native.forced(path):
        plain = fused(Qwen3Config, torch.float32, "2:4")
        model = copy.deepcopy(plain)
        step_in_one_call(model)
        caches = [DynamicCache(config=plain.config) for _ in range(2)]
        errors = []
        with torch.inference_mode():
            for _ in range(9):
                tokens = torch.randint(0, 300, (1, 1))
                expected, y = (
                    one(tokens, past_key_values=cache).logits
                    for one, cache in zip((plain, model), caches, strict=True)
                )
                errors.append(float((y - expected).abs().max() / expected.abs().max()))
        assert sorted(errors)[4] < 1e-5


def test_generates_beyond_the_room_of_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_bitnet.nn import single_token

    monkeypatch.setattr(single_token, "SPARE_TOKENS", 3)
    plain = fused(Qwen2Config, torch.float32)
    model = copy.deepcopy(plain)
    step_in_one_call(model)
    prompt = torch.randint(0, 300, (1, 4))
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(prompt, **options), plain.generate(prompt, **options))
    assert served(model) == [True, True]


def test_a_cache_that_was_cropped_or_rebuilt() -> None:
    plain = fused(LlamaConfig, torch.float32)
    model = copy.deepcopy(plain)
    step_in_one_call(model)
    caches = [DynamicCache(config=plain.config) for _ in range(2)]
    pieces = [torch.randint(0, 300, (1, n)) for n in (9, 1, 1, 6, 1, 1, 1)]
    with torch.inference_mode():
        for index, tokens in enumerate(pieces):
            if index == 3:
                for cache in caches:
                    cache.crop(-3)
            if index == 5:
                for cache in caches:
                    cache.batch_select_indices(torch.tensor([0]))
            expected, y = (
                one(tokens, past_key_values=cache).logits
                for one, cache in zip((plain, model), caches, strict=True)
            )
            assert torch.allclose(y, expected, atol=0.02 * float(expected.abs().max()))


def test_two_threads_with_a_cache_each() -> None:
    model = fused(Qwen2Config, torch.float32)
    step_in_one_call(model)
    options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompts = [torch.arange(3 + i).view(1, -1) for i in range(4)]
    expected = [model.generate(prompt, **options) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda prompt: model.generate(prompt, **options), prompts))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_hidden_states_of_every_layer_can_still_be_had() -> None:
    plain = fused(Qwen2Config, torch.float32)
    model = copy.deepcopy(plain)
    step_in_one_call(model)
    states = []
    for one in (model, plain, model):
        cache = DynamicCache(config=plain.config)
        with torch.inference_mode():
            one(torch.arange(5).view(1, 5), past_key_values=cache)
            token = torch.arange(1).view(1, 1)
            hidden = one(token, past_key_values=cache, output_hidden_states=True).hidden_states
        states.append(hidden)
    for hidden in (states[0], states[2]):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(hidden, states[1], strict=True))


def test_a_cache_is_not_copied_for_every_token() -> None:
    model = fused(LlamaConfig, torch.float32)
    step_in_one_call(model)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(torch.arange(5).view(1, 5), past_key_values=cache)
        places = set()
        for _ in range(9):
            model(torch.arange(1).view(1, 1), past_key_values=cache)
            places.add(cache.layers[0].keys.data_ptr())
    assert len(places) == 1
    assert cache.get_seq_length() == 14


def test_leaves_what_it_does_not_serve_to_the_modules() -> None:
    plain = fused(Qwen2Config, torch.float32)
    model = copy.deepcopy(plain)
    step_in_one_call(model)

    def same(**arguments: Any) -> None:
        made = []
        for one in (plain, model):
            kind, options = arguments.get("cache", (DynamicCache, {}))
            cache = kind(config=plain.config, **options)
            batch = arguments.get("batch", 1)
            first = torch.arange(batch * 6).view(batch, 6)
            mask = arguments.get("mask")
            one(first, past_key_values=cache, attention_mask=None if mask is None else mask[:, :6])
            made.append(
                one(first[:, :1], past_key_values=cache, attention_mask=mask).logits.detach()
            )
        assert torch.equal(*made)
        assert not any(served(model))

    with torch.no_grad():
        same(batch=2)
        mask = torch.ones(1, 7, dtype=torch.int64)
        mask[0, :2] = 0
        same(mask=mask)
        same(cache=(StaticCache, {"max_cache_len": 16}))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            same()
        no_cache = torch.arange(1).view(1, 1)
        assert torch.equal(
            model(no_cache, use_cache=False).logits, plain(no_cache, use_cache=False).logits
        )
        with native.forced("reference"):
            again = fused(Qwen2Config, torch.float32)
            step_in_one_call(again)
            cache = DynamicCache(config=again.config)
            again(torch.arange(4).view(1, 4), past_key_values=cache)
            again(torch.arange(1).view(1, 1), past_key_values=cache)
            assert not any(served(again))


def test_other_models_are_left_alone() -> None:
    odd_heads = fused(LlamaConfig, torch.float32, num_attention_heads=4, head_dim=24)
    assert step_in_one_call(odd_heads) == 0
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    assert step_in_one_call(AutoModelForCausalLM.from_config(config)) == 0


def test_sees_weights_that_change_and_threads() -> None:
    model = fused(Qwen2Config, torch.float32)
    step_in_one_call(model)

    def logits() -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(torch.arange(5).view(1, 5), past_key_values=cache)
            return model(torch.arange(1).view(1, 1), past_key_values=cache).logits

    before, threads = logits(), torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert torch.allclose(logits(), before, atol=0.01)
    finally:
        torch.set_num_threads(threads)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.mul_(3)
    assert not torch.equal(logits(), before)
    halved = logits()
    model.to(torch.bfloat16).to(torch.float32)
    assert torch.allclose(logits(), halved, atol=0.05 * float(halved.abs().max()))


def test_sees_memory_that_was_replaced() -> None:
    """``parameter.data = …`` keeps the object and frees the memory that the call points to."""
    plain = fused(Qwen2Config, torch.float32)
    model = copy.deepcopy(plain)
    step_in_one_call(model)
    prompt = torch.randint(0, 300, (1, 5))
    model.generate(prompt, max_new_tokens=3, do_sample=False)
    for changed in (plain, model):
        for layer in changed.model.layers:
            layer.input_layernorm.weight.data = layer.input_layernorm.weight.data.flip(0) * 3
            bias = layer.self_attn.q_proj.joined.bias
            bias.data = bias.data.flip(0) + 1
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True}
    expected, found = (
        m.generate(prompt, return_dict_in_generate=True, **options) for m in (plain, model)
    )
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(
        torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("name", ["self_attn", "self_attn.k_proj", "mlp", "input_layernorm"])
def test_hooks_in_a_layer_are_called(name: str) -> None:
    model = fused(Qwen2Config, torch.float32)
    step_in_one_call(model)
    seen: list[bool] = []
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(torch.randint(0, 300, (1, 5)), past_key_values=cache)
        module = model.model.layers[1].get_submodule(name)
        handle = module.register_forward_hook(lambda *_: seen.append(True))
        model(torch.randint(0, 300, (1, 1)), past_key_values=cache)
        assert seen
        assert not any(served(model))
        handle.remove()
        model(torch.randint(0, 300, (1, 1)), past_key_values=cache)
    assert len(seen) == 1
    assert all(served(model))
