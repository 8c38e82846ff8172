"""A packed model generates on a GPU: as loaded, made ready, and compiled into CUDA graphs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparse_bitnet.deploy.packed.packing import pack
from sparse_bitnet.deploy.packed.pretrained import load_packed
from sparse_bitnet.nn import convert
from sparse_bitnet.serve.ready import make_ready
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
    expected = generated(load_packed(packed, dtype=torch.float32).cuda())
    model = load_packed(packed, dtype=torch.float32).cuda()
    make_ready(model, compile=compiled)
    assert torch.equal(generated(model), expected)
    assert torch.equal(generated(model), expected)
