"""A packed model generates on a GPU: in transformers' classes, in the decoder, and compiled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from packaging.version import Version
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers import __version__ as installed

from sparse_bitnet.modeling import DecoderForCausalLM, KeyValueCache
from sparse_bitnet.nn import convert
from sparse_bitnet.packed.load import load, load_unfused
from sparse_bitnet.packed.write import pack
from sparse_bitnet.train.presets import preset_config

pytestmark = pytest.mark.gpu
NEW = 24


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(preset_config("demo", 2048))
    convert(model, "6:8")
    directory = tmp_path_factory.mktemp("packed")
    pack(model.eval(), directory)
    return directory


def generated(model: PreTrainedModel) -> torch.Tensor:
    tokens = torch.arange(20, device="cuda")[None]
    return model.generate(tokens, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_same_text(packed: Path, compiled: bool) -> None:
    expected = generated(load_unfused(packed, dtype="float32", device="cuda")[0])
    model, _ = load(packed, dtype="float32", device="cuda", compile=compiled)
    assert isinstance(model, DecoderForCausalLM)
    assert torch.equal(generated(model), expected)
    assert torch.equal(generated(model), expected)


def test_tokens_are_replayed_from_a_graph(packed: Path) -> None:
    """Past several lengths of the cache, with padding and a hole; memory is used by others too."""
    model, _ = load(packed, dtype="float32", device="cuda")
    torch.manual_seed(0)
    ids = torch.randint(1, 2048, (3, 20), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :7] = mask[1, 12] = 0
    asked = {"attention_mask": mask, "max_new_tokens": 900, "eos_token_id": -1, "pad_token_id": 0}
    for _ in range(2):
        found = model.generate(ids, do_sample=False, **asked)
        assert len(model.graph._graphs) >= 3
        noise = [torch.full((2**18,), float("nan"), device="cuda") for _ in range(64)]
        del noise  # what a graph reads and nobody keeps would be written over
    model.graph = lambda *_: None
    assert torch.equal(model.generate(ids, do_sample=False, **asked), found)


def test_conversations_take_turns(packed: Path) -> None:
    model, _ = load(packed, dtype="float32", device="cuda")
    texts = [torch.randint(1, 2048, (1, 5 + one), device="cuda") for one in range(3)]
    results = []
    for recorded in (True, False):
        if not recorded:
            model.graph = lambda *_: None
        pasts = [KeyValueCache(model.config) for _ in texts]
        with torch.no_grad():
            for text, past in zip(texts, pasts, strict=True):
                model(text, past_key_values=past)
            tokens = [text[:, -1:] for text in texts]
            for turn in range(12):
                for index in (0, 1, 2) if turn < 6 else (2, 2, 0):
                    logits = model(tokens[index], past_key_values=pasts[index]).logits
                    tokens[index] = logits.argmax(-1)
                    results.append(logits)
    half = len(results) // 2
    for one, other in zip(results[:half], results[half:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(Version(installed) < Version("5.19"), reason="`serve` needs transformers 5.19")
def test_continuous_batching(packed: Path) -> None:
    model, _ = load(packed, dtype="float32", device="cuda")
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    inputs = [list(range(length)) for length in (3, 20, 9)]
    found = model.generate_batch(inputs, generation_config=config, progress_bar=False)
    assert model.graph._graphs
    for result in found.values():
        ids = torch.tensor([result.prompt_ids], device="cuda")
        expected = model.generate(ids, generation_config=config)
        assert result.generated_tokens == expected[0, ids.shape[1] :].tolist()
