"""The decoder against transformers' own classes over the same packed linears, to the last bit."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    TextStreamer,
)
from transformers.cache_utils import DynamicCache, StaticCache

from sparse_bitnet.core import ConfigError
from sparse_bitnet.kernels import native
from sparse_bitnet.modeling import StaticKeyValueCache, build_decoder
from sparse_bitnet.modeling.layers import Head
from sparse_bitnet.nn.int8_head import Int8Table, int8_modules, quantize_rows, swap_int8

KINDS = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"hidden_act": "gelu"}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    ("mistral", {}),
    ("mistral", {"sliding_window": 7}),
    ("qwen2", {}),
    ("qwen2", {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1}),
    ("qwen3", {}),
]
GREEDY = {"max_new_tokens": 16, "do_sample": False}
OPTIONS = [
    {"do_sample": True, "top_k": 20, "temperature": 1.5},
    {"num_beams": 3},
    {"cache_implementation": "static"},
    {"use_cache": False},
]
TEXTS = [(*kind, {}) for kind in KINDS]
TEXTS += [(*kind, options) for kind in (KINDS[0], KINDS[5], KINDS[8]) for options in OPTIONS]


def both(model):
    """transformers' model and the decoder; both with its head, whose sums have another order."""
    decoder = build_decoder(copy.deepcopy(model))
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        model.set_output_embeddings(Head(head))
    return model, decoder


def prompts(padded=True):
    """Two of 17 tokens, the first with five of padding on its left."""
    mask = torch.ones(2, 17, dtype=torch.int64)
    mask[0, :5] = 0 if padded else 1
    return {"input_ids": torch.randint(1, 300, (2, 17)), "attention_mask": mask}


@pytest.mark.parametrize(("architecture", "changes"), KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_are_equal(packed, architecture, changes, attention):
    model = packed(architecture, attn_implementation=attention, **changes)
    # PyTorch has another gelu for strided rows; in float64 the quantizer never sees its last bit.
    exact = model.config.hidden_act == "silu"
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-12, "atol": 1e-12}
    tolerance |= {"equal_nan": True}  # rows of padding, which eager attention in float64 makes so
    plain, decoder = both(model if exact else model.double())
    for padded in (False, True):
        inputs = prompts(padded)
        expected, found = plain(**inputs), decoder(**inputs)
        torch.testing.assert_close(found.logits, expected.logits, **tolerance)
        assert len(found.past_key_values) == len(expected.past_key_values)
    embedded = plain.get_input_embeddings()(inputs["input_ids"])
    options = {"use_cache": False, "logits_to_keep": 2}
    found = decoder(inputs_embeds=embedded, **options)
    expected = plain(inputs["input_ids"], **options)
    torch.testing.assert_close(found.logits, expected.logits, **tolerance)


@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_linears_and_dtypes(packed, pattern, bits, dtype):
    plain, decoder = both(packed("qwen3", dtype, pattern, bits))
    inputs = prompts()
    expected, found = plain(**inputs).logits.float(), decoder(**inputs).logits.float()
    # Products in floating point may sum in another order where they have more rows.
    exact = pattern is not None and dtype == torch.float32
    error = (found - expected).norm() / expected.norm()
    assert torch.equal(found, expected) if exact else error < (1e-5 if not pattern else 2e-2)


@pytest.mark.parametrize(("architecture", "changes", "options"), TEXTS)
def test_the_same_text(packed, architecture, changes, options):
    plain, decoder = both(packed(architecture, **changes))
    batch = prompts()
    one = {"input_ids": batch["input_ids"][:1]}
    for inputs in (batch, one):
        texts = []
        for model in (plain, decoder):
            torch.manual_seed(0)
            texts.append(model.generate(**inputs, **(GREEDY | options)))
        assert torch.equal(texts[1], texts[0])


def test_prompt_lookup_and_a_cache_of_ones_own(packed):
    plain, decoder = both(packed())
    ids = torch.randint(0, 300, (1, 9)).repeat(1, 2)
    options = GREEDY | {"prompt_lookup_num_tokens": 3}
    assert torch.equal(decoder.generate(ids, **options), plain.generate(ids, **options))
    for cache in (DynamicCache(config=plain.config), DynamicCache()):
        found = decoder.generate(ids, past_key_values=cache, **GREEDY)
        assert torch.equal(found, plain.generate(ids, **GREEDY))
        assert cache.get_seq_length() == found.shape[1] - 1


def test_a_stored_generation_config_is_followed(packed):
    model = packed()
    model.generation_config = GenerationConfig(max_new_tokens=5, use_cache=False, pad_token_id=0)
    _, decoder = both(model)
    found = decoder.generate(torch.arange(4)[None], return_dict_in_generate=True)
    assert found.sequences.shape == (1, 9)
    assert found.past_key_values is None


def test_pieces_are_streamed(packed):
    class Words(TextStreamer):
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen += value.reshape(-1).tolist()

        def end(self):
            self.seen.append(-1)

    _, decoder = both(packed())
    words = Words()
    text = decoder.generate(torch.arange(4)[None], streamer=words, **GREEDY)
    assert words.seen == [*text[0].tolist(), -1]


def test_continuous_batching_gives_the_same_text(packed):
    plain, decoder = both(packed("qwen3"))
    inputs = [torch.randint(1, 300, (length,)).tolist() for length in (3, 11, 6)]
    config = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # Left out, its cache takes most of the memory that is free.
    small = ContinuousBatchingConfig(page_size=32, num_blocks=8, max_batch_tokens=64)
    found = decoder.generate_batch(
        inputs, generation_config=config, continuous_batching_config=small, progress_bar=False
    )
    assert len(found) == 3
    for result in found.values():
        ids = torch.tensor([result.prompt_ids])
        expected = plain.generate(ids, generation_config=config)
        assert result.generated_tokens == expected[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("length", [1, 5])
def test_hidden_states_and_attentions(packed, length):
    plain, decoder = both(packed(attn_implementation="eager"))
    options = {"output_hidden_states": True, "output_attentions": True}
    found, expected = [], []
    for model, results in ((plain, expected), (decoder, found)):
        cache = model(torch.arange(4)[None]).past_key_values
        ids = torch.arange(length)[None]
        results.append(model(ids, past_key_values=cache, **options))
        results.append(model(ids, past_key_values=cache, return_dict=False)[0])
    for name in ("hidden_states", "attentions"):
        pairs = zip(getattr(found[0], name), getattr(expected[0], name), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    torch.testing.assert_close(found[1], expected[1])


def test_labels_give_the_loss(packed):
    plain, decoder = both(packed())
    ids = torch.randint(0, 300, (2, 9))
    assert torch.equal(decoder(ids, labels=ids).loss, plain(ids, labels=ids).loss)


@pytest.mark.parametrize("tied", [False, True])
def test_an_int8_head(packed, tied):
    model = packed("llama", tie_word_embeddings=tied)
    table = quantize_rows(model.get_output_embeddings().weight)
    swap_int8(model, int8_modules(model), device="cpu")
    (int8,) = (module for module in model.modules() if isinstance(module, Int8Table))
    int8.weight.copy_(table[0])
    int8.weight_scale.copy_(table[1])
    plain, decoder = both(model)
    inputs = prompts()
    assert torch.equal(decoder(**inputs).logits, plain(**inputs).logits)
    assert torch.equal(decoder.generate(**inputs, **GREEDY), plain.generate(**inputs, **GREEDY))


def test_a_static_cache_at_one_position(packed):
    """Token by token over slots that hold random numbers: they must not be seen."""
    _, decoder = both(packed("llama"))
    ids = torch.randint(0, 300, (2, 7))
    cache = StaticKeyValueCache(decoder.config, 2, 12, torch.float32, "cpu")
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    for at in range(7):
        found = decoder(ids[:, at : at + 1], past_key_values=cache).logits
    assert cache.get_seq_length() == 7
    torch.testing.assert_close(found, decoder(ids).logits[:, -1:], rtol=1e-5, atol=1e-5)
    cache.position.fill_(6)
    again = decoder(ids[:, 6:], past_key_values=cache).logits
    assert torch.equal(again, found)


def test_transformers_static_cache(packed):
    plain, decoder = both(packed())
    results = []
    for model in (plain, decoder):
        cache = StaticCache(config=model.config, max_cache_len=20)
        model(torch.arange(6)[None], past_key_values=cache)
        results.append(model(torch.arange(1)[None], past_key_values=cache).logits)
    assert torch.equal(*results)


def test_it_is_not_saved(packed, tmp_path):
    _, decoder = both(packed())
    with pytest.raises(ConfigError, match="copy the directory that it was loaded from"):
        decoder.save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_inputs_are_given_once(packed):
    _, decoder = both(packed())
    for given in ({}, {"input_ids": torch.zeros(1, 1).long(), "inputs_embeds": torch.zeros(1)}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            decoder(**given)


def test_without_the_native_library(packed):
    with native.forced("reference"):
        plain, decoder = both(packed())
        ids = torch.arange(5)[None]
        assert torch.equal(decoder.generate(ids, **GREEDY), plain.generate(ids, **GREEDY))
        assert decoder.native.call is None
