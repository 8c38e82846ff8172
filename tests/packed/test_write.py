"""What pack writes, and what it refuses to write."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sparse_bitnet.core import CheckpointError, ConfigError, Method, WeightError
from sparse_bitnet.formats import STORAGES
from sparse_bitnet.nn import SparseBitLinear, convert, master_weights, set_quantization
from sparse_bitnet.packed.load import load, load_packed
from sparse_bitnet.packed.write import pack
from sparse_bitnet.train.config import SparsityConfig
from sparse_bitnet.train.export import save_trained

KINDS = ["qwen2", "qwen2-untied", "llama", "mixtral", "qwen2-moe"]


@pytest.mark.parametrize("storage", sorted(STORAGES))
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_training_bit_by_bit(tmp_path, kind, storage, trained, logits):
    model = trained(kind)
    result = pack(model, tmp_path / "out", storage=storage)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(packed), logits(model))
    assert result.modules == sum(1 for m in model.modules() if hasattr(m, "pattern"))
    assert "bits a weight" in str(result) and str(tmp_path / "out") in str(result)
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert 0 < size - result.packed_bytes - result.other_bytes < 20_000  # the header
    floats = {id(p): p.numel() for p in model.parameters()}
    assert result.float32_bytes == 4 * sum(floats.values())


@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        ("dense", {}),
        ("2:4", {"method": Method(activation_bits=4)}),
        ("4:8", {"rules": {"down_proj": "2:16", "k_proj": "skip", "q_proj": "dense"}}),
    ],
)
def test_patterns_rules_and_activation_bits_survive(tmp_path, pattern, options, trained, logits):
    model = trained("qwen2", pattern, **options)
    pack(model, tmp_path / "out")
    packed = load_packed(tmp_path / "out")
    assert torch.equal(logits(packed), logits(model))
    for name, module in model.named_modules():
        if isinstance(module, SparseBitLinear):
            spec = packed.get_submodule(name).spec
            assert spec.pattern == module.pattern
            assert spec.activation_bits == module.method.activation_bits
    if "rules" in options:
        assert isinstance(packed.model.layers[0].self_attn.k_proj, torch.nn.Linear)


@pytest.mark.parametrize("check", [True, False])
def test_what_is_not_ternary_yet_is_refused(tmp_path, trained, check):
    model = trained("qwen2")
    set_quantization(model, 1, {r"layers\.1.*k_proj": 0.5})
    with pytest.raises(ConfigError, match=r"layers.1.self_attn.k_proj: quantization stands at 0.5"):
        pack(model, tmp_path / "out", check=check)
    set_quantization(model, 1)
    pack(model, tmp_path / "out", check=check)


def test_tied_embeddings_are_stored_once_and_stay_tied(tmp_path, trained):
    pack(trained("qwen2"), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.embed_tokens.weight" in stored and "lm_head.weight" not in stored
    packed = load_packed(tmp_path / "out")
    assert packed.lm_head.weight is packed.model.embed_tokens.weight


def test_stored_tensors(tmp_path, trained, logits):
    pack(trained("qwen2-moe"), tmp_path / "out", dtype="bfloat16")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    layer = "model.layers.0."
    experts = f"{layer}mlp.experts."
    assert {name: (stored[name].dtype, list(stored[name].shape)) for name in stored} | {
        "lm_head.weight": (torch.bfloat16, [300, 32]),
        f"{layer}self_attn.q_proj.weight": (torch.uint8, [32, 8]),
        f"{layer}self_attn.q_proj.weight_scale": (torch.float32, [1]),
        f"{layer}self_attn.q_proj.bias": (torch.bfloat16, [32]),
        f"{layer}input_layernorm.weight": (torch.bfloat16, [32]),
        f"{experts}gate_up_proj": (torch.uint8, [4, 48, 8]),
        f"{experts}gate_up_proj_scale": (torch.float32, [4, 2]),
        f"{experts}down_proj": (torch.uint8, [4, 32, 6]),
        f"{experts}down_proj_scale": (torch.float32, [4, 1]),
    } == {name: (stored[name].dtype, list(stored[name].shape)) for name in stored}
    packed = load_packed(tmp_path / "out")
    assert packed.dtype == torch.bfloat16
    assert logits(packed).dtype == torch.bfloat16


def test_dtype_of_the_rest_is_the_models_own(tmp_path, build, logits):
    build("qwen2").to(torch.float16).save_pretrained(tmp_path / "half")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "half").eval()
    convert(model)
    pack(model, tmp_path / "out")
    packed = load_packed(tmp_path / "out")
    assert packed.dtype == torch.float16
    assert torch.equal(logits(packed), logits(model))


def test_shards(tmp_path, trained, logits):
    model = trained("qwen2")
    pack(model, tmp_path / "out", shard_bytes=3_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    for file in files:
        for name in load_file(tmp_path / "out" / file):
            assert index["weight_map"][name] == file
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(packed), logits(model))


def test_directory_of_a_training_run(tmp_path, trained, logits, tokenizer):
    sparsity = SparsityConfig(pattern="4:8", rules={"up_proj": "6:8"})
    model = trained("qwen2", "4:8", rules={"up_proj": "6:8"})
    save_trained(model, tokenizer, tmp_path / "trained", sparsity)
    pack(tmp_path / "trained", tmp_path / "out")
    packed, tokenizer = load(tmp_path / "out")
    assert torch.equal(logits(packed), logits(model))
    assert tokenizer.decode(tokenizer("return main").input_ids) == "return main"
    again, _ = load(tmp_path / "trained")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("architecture", ["qwen2", "mixtral", "qwen2-moe"])
def test_a_directory_packs_to_the_same_bytes_as_its_model(tmp_path, architecture, trained):
    """One converts its modules one at a time, the other has them all."""
    method = Method(order="mask-then-quant", activation_bits=4)
    model = trained(architecture, "2:4", method=method)
    save_trained(model, None, tmp_path / "trained", SparsityConfig("2:4", method=method))
    pack(model, tmp_path / "one")
    pack(tmp_path / "trained", tmp_path / "two")
    for name in ("model.safetensors", "hf_plugin.py", "generation_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    one, two = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("one", "two"))
    assert one == two


def test_the_model_stays_as_it_is(tmp_path, trained):
    model = trained("qwen2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    pack(model, tmp_path / "out", dtype="bfloat16")
    assert model.config.to_dict() == config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("architecture", ["qwen2", "mixtral"])
@pytest.mark.parametrize("unseen", [False, True])
def test_an_edited_master_weight_is_packed_as_it_is_now(
    tmp_path, trained, logits, architecture, unseen
):
    model = trained(architecture)
    logits(model)
    master = next(master_weights(model)).weight
    change = torch.randn(master.shape)
    if unseen:  # as adapters are merged
        master.data *= change
    else:
        with torch.no_grad():
            master.mul_(change)
    pack(model, tmp_path / "out")
    assert torch.equal(logits(load_packed(tmp_path / "out")), logits(model))


def test_replaces_a_packed_directory_and_nothing_else(tmp_path, trained, logits):
    first, second = trained("qwen2"), trained("qwen2", "2:4")
    pack(first, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"out exists; .* or replace it with --overwrite"):
        pack(second, tmp_path / "out")
    assert torch.equal(logits(load_packed(tmp_path / "out")), logits(first))
    pack(second, tmp_path / "out", overwrite=True)
    assert torch.equal(logits(load_packed(tmp_path / "out")), logits(second))
    (tmp_path / "home").mkdir()
    pack(first, tmp_path / "home")  # an empty directory is fine
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("42")
    with pytest.raises(ConfigError, match="thesis exists and is not a packed model; give ano"):
        pack(first, tmp_path / "thesis", overwrite=True)
    with pytest.raises(ConfigError, match="exists and is not a packed model"):
        pack(first, tmp_path / "thesis" / "chapter.tex", overwrite=True)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "42"
    for mine in ("README.md", "nested", "my.model", "tokenizer.json.d", "polarization"):
        (tmp_path / "out" / mine).mkdir()
        with pytest.raises(ConfigError, match=f"out holds {mine}, which would be lost"):
            pack(first, tmp_path / "out", overwrite=True)
        (tmp_path / "out" / mine).rmdir()
    for mine in ("model-notes.safetensors", "tokenizer-corpus.txt", "a.model"):
        (tmp_path / "out" / mine).write_text("42")
        with pytest.raises(ConfigError, match=f"out holds {mine}, which would be lost"):
            pack(first, tmp_path / "out", overwrite=True)
        (tmp_path / "out" / mine).unlink()
    assert torch.equal(logits(load_packed(tmp_path / "out")), logits(second))


def test_the_current_directory_is_not_replaced(tmp_path, trained, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="is the current directory"):
        pack(trained("qwen2"), ".")


def test_values_beyond_the_dtype(tmp_path, trained):
    """They would be infinite in the file, which loading refuses."""
    model = trained("qwen2")
    with torch.no_grad():
        model.model.norm.weight[3] = 1e5
    with pytest.raises(WeightError, match=r"norm\.weight has values beyond float16; give --dtype"):
        pack(model, tmp_path / "out", dtype="float16")
    assert list(tmp_path.iterdir()) == []
    pack(model, tmp_path / "out", dtype="bfloat16")
    load_packed(tmp_path / "out")


def test_all_that_is_written_may_be_replaced(tmp_path, trained, tokenizer):
    """What packing writes, with every optional file, is known as such."""
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    try:
        for overwrite in (False, True):
            options = {"shard_bytes": 20_000, "overwrite": overwrite}
            pack(trained("qwen2"), tmp_path / "out", tokenizer=tokenizer, **options)
    finally:
        tokenizer.chat_template = None
    model = load_packed(tmp_path / "out")
    model.save_pretrained(tmp_path / "out")
    pack(trained("qwen2"), tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "where",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.self_attn.k_proj.bias",
    ],
)
def test_refuses_nan_and_leaves_nothing_behind(tmp_path, where, value, trained):
    model = trained("qwen2")
    with torch.no_grad():
        model.get_parameter(where).view(-1)[3] = value
    with pytest.raises(WeightError, match=f"{where}: 1 of .* values are NaN or infinite"):
        pack(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def derive_wrongly(module, name, *index):
    """Let a module derive a group of non-zeros."""
    ternary, *rest = module.derived(name)
    ternary[index] = 1
    original = module.derive
    module.derive = lambda asked: (ternary, *rest) if asked == name else original(asked)


def test_refuses_weights_that_break_their_pattern(tmp_path, trained):
    model, experts = trained("qwen2"), trained("qwen2-moe")
    derive_wrongly(model.model.layers[1].mlp.up_proj, "weight", 7, slice(8, 16))
    message = r"layers.1.mlp.up_proj.weight: row 7 has 8 non-zeros in the group from input 8 on, "
    with pytest.raises(WeightError, match=message + "but its pattern is 6:8"):
        pack(model, tmp_path / "out")
    derive_wrongly(experts.model.layers[0].mlp.experts, "down_proj", 2, 5, slice(8))
    message = r"experts.down_proj: row \(2, 5\) has 8 non-zeros in the group from input 0 on"
    with pytest.raises(WeightError, match=message):
        pack(experts, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_pack_keeps_the_directory_that_was_there(tmp_path, trained, logits):
    good, bad = trained("qwen2"), trained("qwen2")
    pack(good, tmp_path / "out")
    derive_wrongly(bad.model.layers[0].mlp.up_proj, "weight", slice(None))
    with pytest.raises(WeightError):
        pack(bad, tmp_path / "out", overwrite=True)
    assert torch.equal(logits(load_packed(tmp_path / "out")), logits(good))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_refuses_models_without_ternary_weights(tmp_path, pristine, build, trained):
    with pytest.raises(ConfigError, match="pack: the model has no ternary modules; convert and"):
        pack(build("qwen2"), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"q_proj: a SparseLinear keeps full-precision weights"):
        pack(trained("qwen2", kind="bf16"), tmp_path / "out")
    with pytest.raises(ConfigError, match="a packed model cannot be packed again"):
        pack(load_packed(pristine / "two-bit"), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"pack: no tokenizer can be loaded from .*nowhere"):
        pack(trained("qwen2"), tmp_path / "out", tokenizer=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="storage is 'zip'; choose among"):
        pack(trained("qwen2"), tmp_path / "out", storage="zip")
    assert list(tmp_path.iterdir()) == []


def test_refuses_directories_that_are_no_trained_model(tmp_path, pristine, build):
    build("qwen2").save_pretrained(tmp_path / "plain")
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").touch()
    for source, message in (
        (tmp_path / "plain", "plain is not a trained model"),
        (tmp_path / "nothing", "nothing holds no model: it does not exist"),
        (tmp_path / "run", r"run is a training run; give its model, .*/run/model"),
    ):
        with pytest.raises(CheckpointError, match=message):
            pack(source, tmp_path / "out")
    with pytest.raises(ConfigError, match="two-bit is packed already; give the model it was made"):
        pack(pristine / "two-bit", tmp_path / "out")
    shutil.rmtree(tmp_path / "plain")
    shutil.rmtree(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_what_save_pretrained_wrote_of_a_converted_model(tmp_path, trained, logits):
    """As Trainer leaves it: packed it computes the same, and no longer calls itself trained."""
    model = trained("qwen2")
    model.save_pretrained(tmp_path / "saved")
    pack(tmp_path / "saved", tmp_path / "packed")
    assert "sparse_bitnet" not in json.loads((tmp_path / "packed" / "config.json").read_text())
    assert torch.equal(logits(load_packed(tmp_path / "packed")), logits(model))
