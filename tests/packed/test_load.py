"""Loading packed directories: what comes back, in which dtype, by which middleware."""

import copy
import json
import pickle

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, pipeline

from sparse_bitnet.core import CheckpointError, ConfigError, PackedFormatError
from sparse_bitnet.kernels import native
from sparse_bitnet.kernels.native.layer import StepCall
from sparse_bitnet.modeling import DecoderForCausalLM
from sparse_bitnet.nn import convert
from sparse_bitnet.nn.packed_linear import PackedLinear
from sparse_bitnet.packed.load import is_packed, load, load_packed, load_unfused
from sparse_bitnet.packed.write import pack
from sparse_bitnet.train import SparsityConfig
from sparse_bitnet.train.export import save_trained

Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("name", ["two-bit", "trits", "sharded"])
def test_loads_lazily_and_runs(pristine, name, trained, logits):
    model = AutoModelForCausalLM.from_pretrained(pristine / name)
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert len(packed) == 14 and not any(m._prepared for m in packed)
    assert packed[0].where == Q
    assert torch.equal(logits(model), logits(trained("qwen2")))
    assert model.is_quantized and not model.training


@pytest.mark.parametrize("kind", ["qwen2", "mixtral", "qwen2-moe"])
def test_save_pretrained_round_trip(tmp_path, kind, trained, logits):
    pack(trained(kind), tmp_path / "one", storage="trits")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    expected = logits(model)  # with the compute layout derived
    model.save_pretrained(tmp_path / "two", max_shard_size="20KB")
    again = load_packed(tmp_path / "two")
    assert torch.equal(logits(again), expected)
    one, two = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("one", "two"))
    assert two["quantization_config"] == one["quantization_config"]
    assert two["auto_map"] == one["auto_map"]
    plugins = [(tmp_path / d / "hf_plugin.py").read_text() for d in ("one", "two")]
    assert plugins[0] == plugins[1]
    model.config.save_pretrained(tmp_path / "config")  # alone, there is no plugin file to point to
    assert "auto_map" not in json.loads((tmp_path / "config" / "config.json").read_text())
    again.save_pretrained(tmp_path / "three")
    assert torch.equal(logits(load_packed(tmp_path / "three")), expected)


def test_save_pretrained_on_other_ranks_and_of_copies(tmp_path, pristine):
    model = load_packed(pristine / "two-bit")
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert list((tmp_path / "other").iterdir()) == []
    other = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    other.save_pretrained(tmp_path / "other")
    assert load_packed(tmp_path / "other").is_quantized


@pytest.mark.parametrize("kind", ["qwen2", "qwen2-untied"])
def test_base_model_without_a_head(tmp_path, kind, trained):
    model = trained(kind)
    pack(model, tmp_path / "out")
    base = AutoModel.from_pretrained(tmp_path / "out")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = model.model(ids).last_hidden_state
        assert torch.equal(base(ids).last_hidden_state, expected)
    base.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        again = AutoModel.from_pretrained(tmp_path / "base")
        assert torch.equal(again(ids).last_hidden_state, expected)
    if kind == "qwen2-untied":
        with pytest.raises(PackedFormatError, match=r"1 tensors of the model are missing.*lm_head"):
            load_packed(tmp_path / "base")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_changes_the_rest_and_not_the_scales(pristine, dtype, logits):
    full = load_packed(pristine / "two-bit")
    half = load_packed(pristine / "two-bit", dtype=dtype)
    cast = copy.deepcopy(full).to(dtype)
    for model in (half, cast):
        q, q_full = (m.get_submodule(Q) for m in (model, full))
        assert q.weight.dtype == torch.uint8 and q.bias.dtype == dtype
        assert torch.equal(q.weight, q_full.weight)
        assert torch.equal(q.weight_scale, q_full.weight_scale)
    # The cast also rounded the rotary frequencies, which transformers keeps in float32.
    cast.model.rotary_emb.inv_freq = full.model.rotary_emb.inv_freq
    assert torch.equal(logits(half), logits(cast))
    assert (logits(half).float() - logits(full)).abs().max() < 0.1


def test_generates_the_same_tokens_as_training(pristine, trained):
    prompt = torch.tensor([[5, 9, 2]])
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    model, packed = trained("qwen2"), load_packed(pristine / "trits")
    assert torch.equal(packed.generate(prompt, **options), model.generate(prompt, **options))


def test_pipeline(pristine, tokenizer):
    generate = pipeline("text-generation", model=str(pristine / "two-bit"), tokenizer=tokenizer)
    results = generate(["return the", "def"], max_new_tokens=4, do_sample=False)
    alone = generate("def", max_new_tokens=4, do_sample=False)
    assert results[0][0]["generated_text"].startswith("return the")
    assert results[1] == alone


@pytest.mark.parametrize("architecture", ["qwen2", "mixtral", "phi3"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_trained_and_packed_compute_the_same_in_any_dtype(
    trained, logits, tmp_path, architecture, dtype
):
    """Ternary weights come from the float32 master weights, whatever the rest computes in."""
    save_trained(trained(architecture), None, tmp_path / "trained", SparsityConfig())
    pack(tmp_path / "trained", tmp_path / "packed")
    model, _ = load(tmp_path / "trained", dtype=dtype, device="cpu")
    packed, _ = load(tmp_path / "packed", dtype=dtype, device="cpu")
    assert model.dtype == packed.dtype == getattr(torch, dtype)
    assert torch.equal(logits(model), logits(packed))


def test_load_takes_packed_trained_and_ordinary_directories(
    pristine, tmp_path, build, capsys, logits
):
    model, tokenizer = load(pristine / "two-bit", dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and tokenizer is not None
    build("qwen2").to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    assert is_packed(pristine / "two-bit") and not is_packed(tmp_path / "plain")
    capsys.readouterr()
    model, tokenizer = load(tmp_path / "plain", device="cpu")
    assert "plain: an ordinary Qwen2ForCausalLM in bfloat16" in capsys.readouterr().err
    assert model.dtype == torch.bfloat16 and tokenizer is None
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto")
    assert torch.equal(logits(model), logits(expected))
    assert load(tmp_path / "plain", dtype="float32", device="cpu")[0].dtype == torch.float32
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").touch()
    with pytest.raises(
        CheckpointError, match=r"run is a training run; give its model, .*/run/model"
    ):
        load(tmp_path / "run")
    with pytest.raises(CheckpointError, match="nothing holds no model: it does not exist"):
        load(tmp_path / "nothing")
    with pytest.raises(PackedFormatError, match=r"there is no config.json of a packed Sparse-Bit"):
        load_packed(tmp_path / "plain")
    with pytest.raises(PackedFormatError, match=r"there is no config.json of a packed Sparse-Bit"):
        load_packed(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("kind", "fused"), [("qwen2", True), ("llama", True), ("phi3", False), ("mixtral", False)]
)
@pytest.mark.parametrize("head", ["float", "int8"])
def test_load_builds_the_decoder_of_the_llama_family(
    tmp_path, kind, fused, head, trained, tokenizer, logits
):
    pack(trained(kind), tmp_path / "packed", head=head, tokenizer=tokenizer)
    model, _ = load(tmp_path / "packed", device="cpu")
    plain, _ = load_unfused(tmp_path / "packed", device="cpu")
    assert isinstance(model, DecoderForCausalLM) is fused
    assert type(plain) is type(trained(kind))
    # PyTorch's silu differs by an ulp where rows are strided and end in no whole vector.
    torch.testing.assert_close(logits(model), logits(plain), rtol=0.02, atol=0.02)
    options = {"max_new_tokens": 8, "do_sample": False}
    tokens = torch.arange(5)[None]
    assert torch.equal(model.generate(tokens, **options), plain.generate(tokens, **options))


@pytest.mark.skipif(not native.available(), reason="the package was built without a compiler")
def test_a_loaded_decoder_takes_single_tokens_in_one_call(tmp_path, trained, monkeypatch):
    model = trained("llama")
    config = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    model = type(model)(type(model.config)(**(model.config.to_dict() | config))).eval()
    convert(model, "6:8")
    pack(model, tmp_path / "packed")
    loaded, _ = load(tmp_path / "packed", device="cpu")
    calls, served = [], StepCall.__call__

    def counted(self, *arguments):
        calls.append(1)
        return served(self, *arguments)

    monkeypatch.setattr(StepCall, "__call__", counted)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    tokens = torch.randint(0, 64, (1, 5))
    found = loaded.generate(tokens, **options)
    assert len(calls) == 3  # tokens after the first
    assert torch.equal(found, model.generate(tokens, **options))


def test_compiling_wants_a_gpu(pristine):
    with pytest.raises(ConfigError, match="compile needs the model on an NVIDIA GPU, it is on cpu"):
        load(pristine / "two-bit", device="cpu", compile=True)


@pytest.mark.parametrize(
    ("device", "why"),
    [
        ("cudaa", "Expected one of cpu, cuda"),
        ("meta", "it holds shapes and no numbers"),
        pytest.param(
            "cuda",
            "",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_a_device_that_is_not_there(pristine, device, why):
    with pytest.raises(ConfigError, match=rf"device '{device}' cannot be used here \(.*{why}.*cpu"):
        load(pristine / "two-bit", device=device)
