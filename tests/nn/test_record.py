"""A converted model's directory: transformers gives the converted model again, or fails."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

from sparse_bitnet.core import CheckpointError, ConfigError, Method
from sparse_bitnet.nn import SparseBitLinear, convert, master_weights, set_pattern
from sparse_bitnet.nn.record import ABSENT
from sparse_bitnet.packed.write import pack
from sparse_bitnet.train.callback import SparseBitNetCallback
from sparse_bitnet.train.dense import read_dense
from sparse_bitnet.train.export import is_trained, load_trained
from sparse_bitnet.version import __version__


def described(directory):
    found = json.loads((directory / "config.json").read_text())
    return found


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen2_moe", "mixtral", "gemma2"])
@pytest.mark.parametrize("kind", ["bitnet", "bf16"])
def test_from_pretrained_gives_the_converted_model_again(
    tiny, tokens, logits, tmp_path, architecture, kind
):
    model = tiny(architecture)
    method = Method(order="mask-then-quant")
    rules = {r"v_proj$": "2:4", "k_proj": "skip"}
    convert(model, "6:8", kind=kind, method=method, rules=rules)
    set_pattern(model, "4:8")
    model.save_pretrained(tmp_path / "first")
    written = described(tmp_path / "first")["quantization_config"]
    assert written["pattern"] == "4:8" and written["version"] == __version__
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    for one, other in zip(master_weights(again), master_weights(model), strict=True):
        assert (one.name, one.pattern) == (other.name, other.pattern)
        assert type(one.module) is type(other.module) and one.module.method == method
        assert torch.equal(one.weight, other.weight)
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    # It is an ordinary model, which trains and is saved as the first was.
    assert not again.is_quantized and not hasattr(again, "hf_quantizer")
    assert not hasattr(again.config, "_is_quantized")
    assert not hasattr(again.config, "quantization_config")
    again.train()(input_ids=tokens, labels=tokens).loss.backward()
    again.save_pretrained(tmp_path / "second")
    assert described(tmp_path / "second") == described(tmp_path / "first")
    # By our own readers: converted, and the dense model of the master weights.
    assert is_trained(tmp_path / "first")
    assert torch.equal(logits(load_trained(tmp_path / "first")[0], tokens), logits(model, tokens))
    dense = read_dense(tmp_path / "first")
    dense.save_pretrained(tmp_path / "dense")
    assert not is_trained(tmp_path / "dense")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")) is type(dense)


def test_master_weights_stay_float32(tiny, tokens, tmp_path):
    model = tiny()
    convert(model, "6:8")
    model.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert again.model.embed_tokens.weight.dtype == dtype
        for one, other in zip(master_weights(again), master_weights(model), strict=True):
            assert torch.equal(one.weight, other.weight)
        assert again(input_ids=tokens).logits.dtype == dtype


def test_a_dense_model_of_its_configuration(tiny, tmp_path):
    """A baseline stays one, also where it was made while the converted model could not be saved."""
    model = tiny()
    convert(model, "6:8")
    model.save_pretrained(tmp_path / "converted")
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        model.save_pretrained(tmp_path / "file" / "nowhere")
    AutoModelForCausalLM.from_config(model.config).save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in described(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not list(master_weights(again))


def test_a_dense_model_of_its_config_file(tiny, tmp_path):
    """The configuration in the file brings the record along, but not the absent weights."""
    model = tiny()
    convert(model, "6:8")
    model.save_pretrained(tmp_path / "converted")
    config = AutoConfig.from_pretrained(tmp_path / "converted")
    for _ in range(2):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", config=config)
        assert list(master_weights(again))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    with pytest.raises(CheckpointError, match="remove that entry to load a dense model"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not is_trained(tmp_path / "dense")
    assert not list(master_weights(read_dense(tmp_path / "dense")))


RULES = {r"^model\.layers\.0\.": "skip", r"v_proj$": "2:4", "lm_head": "skip"}


@pytest.mark.parametrize("saved", ["whole", "base"])
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
def test_a_base_model(tiny, tokens, tmp_path, saved, auto):
    """Saved as what it is or as the whole, and read as either."""
    model = tiny(tie_word_embeddings=True)
    convert(model, "6:8", rules=RULES)
    set_pattern(model, "4:8")
    (model if saved == "whole" else model.model).save_pretrained(tmp_path / "one")
    assert described(tmp_path / "one")["transformers_weights"] == ABSENT
    for directory in ("one", "two"):
        again = auto.from_pretrained(tmp_path / directory)
        base = again if auto is AutoModel else again.model
        patterns = [(m.name.removeprefix("model."), m.pattern) for m in master_weights(again)]
        wanted = [(m.name.removeprefix("model."), m.pattern) for m in master_weights(model)]
        assert patterns == wanted
        with torch.no_grad():
            assert torch.equal(base(tokens)[0], model.eval().model(tokens)[0])
        again.save_pretrained(tmp_path / "two")


def test_a_new_head_stays_dense(tiny, tmp_path):
    model = tiny()
    convert(model, "6:8")
    model.save_pretrained(tmp_path / "one")
    classes = (AutoModelForSequenceClassification, AutoModelForTokenClassification)
    for auto in classes:
        again = auto.from_pretrained(tmp_path / "one")
        assert type(again.score) is nn.Linear
        names = [master.name for master in master_weights(again)]
        assert names == [master.name for master in master_weights(model)]
    # One that was converted is left behind with the model that had it.
    dense = classes[1].from_config(model.config)
    convert(dense, "6:8")
    dense.save_pretrained(tmp_path / "two")
    assert isinstance(classes[1].from_pretrained(tmp_path / "two").score, SparseBitLinear)
    names = [m.name for m in master_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "two"))]
    assert names == [master.name for master in master_weights(model)]


def test_arguments_by_position(tiny, tmp_path):
    model = tiny()
    convert(model, "6:8")
    state = {name: torch.ones_like(tensor) for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, True, state, False, "1GB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(bool((tensor == 1).all()) for tensor in again.state_dict().values())
    with pytest.raises(ConfigError, match=r"model\.push_to_hub"):
        model.save_pretrained(tmp_path, True, None, True)


LOAD_BOTH = """
import traceback
from transformers import AutoModel
for name in ("whole", "base"):
    try:
        print(type(AutoModel.from_pretrained(name).layers[0].mlp.up_proj).__name__)
    except Exception:
        traceback.print_exc()
"""


@pytest.mark.parametrize("first", ["", "import sparse_bitnet\n"], ids=["without", "with"])
def test_in_another_process(tiny, tmp_path, first, request):
    """Without the package an error whose last line says what to install; never a dense model."""
    model = tiny()
    convert(model, "6:8")
    model.save_pretrained(tmp_path / "whole")
    model.model.save_pretrained(tmp_path / "base")
    python = request.getfixturevalue("only_torch" if first else "only_transformers")
    done = python(first + LOAD_BOTH, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ("SparseBitLinear\n" * 2 if first else ""), done.stderr
    if not first:
        for words in (ABSENT, "Unknown quantization type"):
            assert done.stderr.count(words) >= 2


def test_copies_save_themselves(tiny, tmp_path):
    model = tiny()
    convert(model, "6:8")
    for number, other in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        with torch.no_grad():
            other.model.norm.weight.fill_(number + 2)
        other.save_pretrained(tmp_path / str(number))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / str(number))
        assert again.model.norm.weight[0] == number + 2
        assert isinstance(again.model.layers[0].mlp.up_proj, SparseBitLinear)


def test_models_of_others_have_no_record():
    model = nn.Sequential(nn.Linear(8, 8))
    convert(model, "6:8")
    assert not hasattr(model, "save_pretrained")


@pytest.mark.parametrize(
    "damage",
    [
        {"pattern": "8:6"},
        {"pattern": None},
        {"kind": "int3"},
        {"kind": 3},
        {"method": 1},
        {"method": {"speed": 1}},
        {"modules": ["model.layers.0.mlp.up_proj"]},
        {"modules": {"model.layers.9.mlp.up_proj": None}},
        {"modules": {"layers.9.mlp.up_proj": None}},
        {"modules": {"model.norm": None}},
        {"modules": {"model.layers.0.mlp.up_proj": 3}},
        {"more": 1},
    ],
)
def test_a_damaged_record(tiny, tmp_path, damage):
    model = tiny()
    convert(model, "6:8")
    model.save_pretrained(tmp_path)
    values = described(tmp_path)
    values["quantization_config"] |= damage
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"config\.json: quantization_config is damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_trainer_resumes_and_packs(tiny, tokens, tmp_path):
    """A checkpoint of ``Trainer``: resumed from, loaded, trained on, packed."""

    def trainer(model, steps):
        rows = [{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i} for i in range(8)]
        options = {"use_cpu": True, "report_to": [], "save_steps": 2, "seed": 1}
        arguments = TrainingArguments(
            str(tmp_path / "run"), max_steps=steps, learning_rate=0.01, **options
        )
        callbacks = [SparseBitNetCallback("6:8")]
        return Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)

    def converted():
        model = tiny()
        convert(model, "6:8")
        return model

    whole = trainer(converted(), 4)
    whole.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    resumed = trainer(converted(), 4)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    wanted = whole.model.eval()(input_ids=tokens).logits
    assert torch.equal(resumed.model.eval()(input_ids=tokens).logits, wanted)
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-4")
    assert torch.equal(last(input_ids=tokens).logits, wanted)
    pack(tmp_path / "run" / "checkpoint-4", tmp_path / "packed")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(packed(input_ids=tokens).logits, wanted)
    trainer(last, 1).train()  # a loaded model trains like a converted one
