"""The presets have the published shapes."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparse_bitnet.core import ConfigError
from sparse_bitnet.nn import convert
from sparse_bitnet.train.presets import PRESETS, preset_config


@pytest.mark.parametrize(
    ("name", "parameters"),
    # As the released models report them, tied embeddings counted once.
    [
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-3b", 3_085_938_688),
    ],
)
def test_published_parameter_counts(name, parameters):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(preset_config(name))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.config.rope_parameters["rope_theta"] == 1e6
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("name", PRESETS)
def test_linear_weights_are_what_is_converted(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(preset_config(name, 64))
    assert convert(model, "6:8").weights == PRESETS[name].linear_weights


def test_sizes_of_the_studies():
    assert PRESETS["study-5m"].linear_weights == pytest.approx(4.7e6, rel=0.01)
    assert PRESETS["study-20m"].linear_weights == pytest.approx(20e6, rel=0.01)


def test_wrong_names_and_vocabularies():
    with pytest.raises(ConfigError, match=r"preset 'qwen9' is unknown; choose among tiny, demo"):
        preset_config("qwen9")
    with pytest.raises(ConfigError, match="preset tiny takes its vocabulary from the data"):
        preset_config("tiny")
