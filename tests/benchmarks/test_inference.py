"""The timed decoders compute what a decoder computes, and rows have what was measured."""

from functools import partial

import pytest
import torch

from decoders import interleaved, random_decoder
from inference import Case, Row, _cache, _static_cache, _static_step, _step, call_of, measure
from sparse_bitnet.core import ConfigError

SMALL = {"vocabulary": 64, "device": "cpu", "dtype": torch.float32}


@pytest.mark.parametrize("kind", ["bf16", "6:8"])
@pytest.mark.parametrize("head", ["bf16", "int8"])
def test_a_step_is_timed_over_the_same_cache_again_and_again(kind, head):
    torch.manual_seed(0)
    decoder = random_decoder("tiny", kind, head=head, **SMALL)
    with torch.no_grad():
        prefill = call_of(decoder, Case("prefill", 2, 7))
        step = call_of(decoder, Case("decode", 2, 7))
        tokens = torch.randint(0, 64, (2, 1))
        case = Case("decode", 2, 7)
        static = partial(_static_step, decoder, tokens, _static_cache(decoder, case), 7)
        for call in (prefill, step, static):
            first = call()
            assert first.shape == (2, 1, 64)
            assert torch.equal(call(), first)


def test_static_and_growing_caches_give_the_same_step():
    decoder = random_decoder("tiny", "6:8", **SMALL)
    case, tokens = Case("decode", 2, 7), torch.randint(0, 64, (2, 1))
    static, growing = _static_cache(decoder, case), _cache(decoder, case)
    for one, other in zip(static.layers, growing.layers, strict=True):
        one.keys[:, :, :7], one.values[:, :, :7] = other.keys, other.values
    with torch.no_grad():
        found = _static_step(decoder, tokens, static, 7)
        torch.testing.assert_close(found, _step(decoder, tokens, growing), rtol=1e-5, atol=1e-5)


def test_layers_are_copies_in_their_own_memory():
    decoder = random_decoder("tiny", "2:4", layers=3, **SMALL)
    first, second, third = decoder.model.layers
    one, other = (layer.mlp.down_proj for layer in (first, second))
    assert torch.equal(one.unpack("weight"), other.unpack("weight"))
    one, other = one.prepared("weight"), other.prepared("weight")
    assert one.packed.data_ptr() != other.packed.data_ptr()
    assert one.w_scale.data_ptr() != other.w_scale.data_ptr()
    assert [layer.self_attn.layer_idx for layer in (first, second, third)] == [0, 1, 2]
    assert all(layer.self_attn.config is decoder.config for layer in decoder.model.layers)


def test_a_preset_that_is_not_there():
    for vocabulary in (None, 64):
        with pytest.raises(ConfigError, match="preset 'gpt-5' is unknown"):
            random_decoder("gpt-5", "bf16", vocabulary=vocabulary, device="cpu")


def test_candidates_take_turns():
    order = []
    calls = {name: [lambda name=name: order.append(name)] for name in "ab"}
    times = interleaved(calls, repeats=3)
    assert order[2:] == ["a", "b"] * 3
    assert [len(t) for t in times.values()] == [3, 3]


def test_rows_hold_all_repeats_and_ratios():
    cases = [Case("prefill", 1, 8), Case("decode", 2, 8)]
    rows = list(
        measure("tiny", cases, kinds=("bf16", "6:8"), repeats=2, vocabulary=64, compiled=False)
    )
    assert [row.case for row in rows] == cases
    values = rows[0].to_dict()
    assert set(values["microseconds"]) == {"bf16", "6:8"} and not values["problem"]
    assert len(values["microseconds"]["6:8"]["all"]) == 2
    assert values["backends"]["6:8"]["mlp.down_proj"] in ("native", "reference")


def test_ratios():
    row = Row("tiny", Case("decode", 4, 8), {"bf16": [8.0, 9.0, 1.0], "6:8": [2.0]})
    assert row.ratio("6:8", "bf16") == 4.0 and row.ratio("6:8", "dense") is None
    assert row.to_dict()["tokens_per_second"]["6:8"] == 2e6
