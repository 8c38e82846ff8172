"""A packed model generates on a GPU: in transformers' classes, in the decoder, and compiled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from sparse_bitnet.modeling import DecoderForCausalLM
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


def test_continuous_batching(packed: Path) -> None:
    model, _ = load(packed, dtype="float32", device="cuda")
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    inputs = [list(range(length)) for length in (3, 20, 9)]
    found = model.generate_batch(inputs, generation_config=config, progress_bar=False)
    for result in found.values():
        ids = torch.tensor([result.prompt_ids], device="cuda")
        expected = model.generate(ids, generation_config=config)
        assert result.generated_tokens == expected[0, ids.shape[1] :].tolist()
