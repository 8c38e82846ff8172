"""Directories of others: nothing random, no code, no network, no blow-up."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_bitnet.core import CheckpointError, ConfigError
from sparse_bitnet.train.config import ModelConfig
from sparse_bitnet.train.dense import foreign_code, is_gguf, read_dense
from sparse_bitnet.train.model import build_model
from tiny_models import preset_model

WEIGHT = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def directory(tmp_path):
    preset_model(0, 32).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_weights(directory, edit):
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def bring_code(directory):
    """Let the directory bring a module that leaves a trace when it runs."""
    trace = directory.parent / "trace"
    (directory / "code.py").write_text(f"open({str(trace)!r}, 'w')\nclass Own: pass\n")
    return trace


def test_what_it_reads(directory):
    model = read_dense(directory, exact=True)
    assert model.dtype == torch.float32
    assert not model.training
    expected = load_file(directory / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], t) for name, t in expected.items())


def test_a_missing_weight_is_not_made_up(directory):
    edit_weights(directory, lambda tensors: tensors.pop(WEIGHT))
    with pytest.raises(CheckpointError, match=f"1 weights .* missing from the files, {WEIGHT}"):
        read_dense(directory)
    with pytest.raises(ConfigError, match=f"model.source .*{WEIGHT}"):
        build_model(ModelConfig(str(directory)), vocab_size=32, seed=0, device=torch.device("cpu"))


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/b", 7, None])
def test_an_index_that_leads_elsewhere(directory, name):
    index = {"metadata": {}, "weight_map": {WEIGHT: name}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        read_dense(directory)


def test_a_weight_that_has_no_place(directory):
    edit_weights(directory, lambda tensors: tensors.update(foreign=torch.ones(2)))
    read_dense(directory)
    with pytest.raises(CheckpointError, match="in the files, but not in the model, foreign"):
        read_dense(directory, exact=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(directory, bad):
    edit_weights(directory, lambda tensors: tensors["model.norm.weight"].fill_(bad))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: 64 of 64 values are NaN"):
        read_dense(directory)


@pytest.mark.parametrize("layers", [3000, 2**31, -1, "2", None, 2.5])
def test_layers_that_no_file_holds(directory, layers):
    """transformers would first build them."""
    edit_config(directory, num_hidden_layers=layers)
    with pytest.raises(CheckpointError, match=r"num_hidden_layers is .* there are 26 tensors"):
        read_dense(directory)


@pytest.mark.parametrize("known", [True, False])
def test_code_is_not_run_and_nobody_is_asked(directory, known, monkeypatch):
    trace = bring_code(directory)
    own = {"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.Own"}
    edit_config(directory, auto_map=own, **({} if known else {"model_type": "own"}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    if known:
        read_dense(directory)
    else:
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            read_dense(directory)
        shape = ModelConfig(str(directory / "config.json"))
        with pytest.raises(ConfigError, match=r"model\.source"):
            build_model(shape, vocab_size=32, seed=0, device=torch.device("cpu"))
    assert not trace.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"attn_implementation": "somebody/kernel"},
        {"_attn_implementation": "somebody/kernel@v1:flash"},
        {"experts_implementation": {"": "somebody/kernel"}},
        {"text_config": {"layers": [{"_attn_implementation": "somebody/kernel"}]}},
    ],
)
def test_kernels_are_not_fetched(directory, change):
    edit_config(directory, **change)
    with pytest.raises(CheckpointError, match=r"somebody/kernel.* a repository of code"):
        read_dense(directory)


@pytest.mark.parametrize("name", ["m.gguf", "M.GGUF"])
def test_gguf_files_by_name(tmp_path, name):
    assert not is_gguf(tmp_path / name)
    (tmp_path / name).touch()
    assert is_gguf(tmp_path / name)
    assert not is_gguf(tmp_path)


def test_ordinary_implementations_are_no_code():
    for name in ("sdpa", "eager", None, True):
        assert foreign_code({"_attn_implementation": name, "text_config": {"a": ["b/c"]}}) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\udcff", "[" * 100_000])
def test_damaged_configurations(directory, text):
    (directory / "config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        read_dense(directory)


@pytest.mark.parametrize("layers", [10**9, -1, "2", 10**400])
def test_a_shape_of_more_layers_than_there_are(directory, layers):
    """transformers would make a list that long before anything is built."""
    edit_config(directory, num_hidden_layers=layers, layer_types=None)
    shape = ModelConfig(str(directory / "config.json"))
    with pytest.raises(ConfigError, match=r"num_hidden_layers is .* more than any model has"):
        build_model(shape, vocab_size=32, seed=0, device=torch.device("cpu"))
