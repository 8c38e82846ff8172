"""Where a run's model comes from."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, masking_utils

from sparse_bitnet.core import ConfigError
from sparse_bitnet.data.tokenizer import train_bpe
from sparse_bitnet.train.config import ModelConfig, SparsityConfig
from sparse_bitnet.train.model import MASKLESS, build_model, convert_model, maskless_attention
from tiny_models import tiny, tiny_config

CPU = torch.device("cpu")
LLAMA = tiny_config("llama", vocab_size=40, num_hidden_layers=1)


def build(vocab_size=40, seed=0, **config):
    settings = ModelConfig(**config)
    return build_model(settings, vocab_size=vocab_size, seed=seed, device=CPU)


def test_presets_are_a_function_of_the_seed():
    one, same, other = build(seed=1), build(seed=1), build(seed=2)
    assert one.dtype == torch.float32
    assert one.training
    pairs = zip(one.parameters(), same.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert one.lm_head.weight.shape[0] == 40


def test_vocabulary_can_be_larger_than_the_data_needs():
    model = build_model(ModelConfig(vocab_size=64), vocab_size=40, seed=0, device=CPU)
    assert model.config.vocab_size == 64


def test_from_config_json(tmp_path):
    LLAMA.save_pretrained(tmp_path)
    model = build(source=str(tmp_path / "config.json"))
    assert type(model).__name__ == "LlamaForCausalLM"


def test_sub_norms(tmp_path):
    AutoModelForCausalLM.from_config(LLAMA).save_pretrained(tmp_path)
    config = ModelConfig(source=str(tmp_path), sub_norms=True)
    tokens = torch.arange(32).view(2, 16)
    made = [
        build_model(config, vocab_size=40, seed=0, device=CPU, sample=lambda: tokens)
        for _ in range(2)
    ]
    assert type(made[0]).__name__ == "BitNetForCausalLM"
    assert made[0].training
    pairs = zip(made[0].parameters(), made[1].parameters(), strict=True)
    assert all(torch.equal(p, q) and p.requires_grad for p, q in pairs)
    with pytest.raises(ConfigError, match="for a start from a directory"):
        build(sub_norms=True)


def test_from_weights(tmp_path):
    dense = AutoModelForCausalLM.from_config(LLAMA).to(torch.bfloat16)
    dense.save_pretrained(tmp_path)
    model = build(source=str(tmp_path))
    assert model.dtype == torch.float32
    assert torch.equal(model.lm_head.weight, dense.lm_head.weight.float())
    report = convert_model(model, SparsityConfig(pattern="2:4", rules={"down_proj": "skip"}))
    assert report.modules == 6


def test_wrong_sources_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"'tinny' is no preset \(tiny, demo, .*no config\.json"):
        build(source="tinny")
    with pytest.raises(ConfigError, match=f"model.source {tmp_path}"):
        build(source=str(tmp_path))  # an empty directory
    file = tmp_path / "model.gguf"
    file.touch()
    with pytest.raises(ConfigError, match=f"model.source {file} is a GGUF file; make a directory"):
        build(source=str(file))
    LLAMA.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"model.source {tmp_path}"):
        build(source=str(tmp_path))  # a configuration without weights
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(ConfigError, match=f"model.source {broken}"):
        build(source=str(broken))
    LLAMA.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has 40 embedding rows, but the data's tokenizer needs"):
        build(vocab_size=41, source=str(tmp_path / "config.json"))


@pytest.mark.parametrize(("name", "taken"), [("gemma2", "eager"), ("qwen2", "sdpa")])
def test_attention_that_an_architecture_has(tmp_path, name, taken):
    tiny(name).save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "config.json"):
        assert build(source=str(source)).config._attn_implementation == taken


def test_weights_know_the_token_ids_of_one_tokenizer(tmp_path):
    """Fewer ids than rows, so that all of them are there, and mean something else."""
    own, other = (train_bpe([text], 260) for text in ("some text, some more", "words of others"))
    tiny(vocab_size=260).save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    options = {"vocab_size": 258, "seed": 0, "device": CPU}
    build_model(ModelConfig(source=str(tmp_path)), tokenizer=own, **options)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"model.source .* another tokenizer .*--model"):
            build_model(ModelConfig(source=str(tmp_path)), tokenizer=other, **options)
        (tmp_path / "tokenizer_config.json").unlink(missing_ok=True)  # and tokenizer.json alone
    shape = ModelConfig(source=str(tmp_path / "config.json"))
    build_model(shape, tokenizer=other, **options)
    own.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>"]}
    )  # as for a chat template
    build_model(ModelConfig(source=str(tmp_path)), tokenizer=own, **options)


def test_a_tokenizer_that_cannot_be_loaded_is_not_compared(tmp_path, capsys):
    """The data's stands in for it."""
    tiny(vocab_size=260).save_pretrained(tmp_path)
    code = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(code))
    tokenizer = train_bpe(["some text, some more"], 260)
    source = ModelConfig(source=str(tmp_path))
    build_model(source, vocab_size=258, seed=0, device=CPU, tokenizer=tokenizer)
    assert "its tokenizer is not compared with the data's" in " ".join(
        capsys.readouterr().err.split()
    )


def test_vocabulary_of_weights_is_fixed(tmp_path):
    AutoModelForCausalLM.from_config(LLAMA).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.vocab_size cannot change the vocabulary of"):
        build_model(
            ModelConfig(source=str(tmp_path), vocab_size=64), vocab_size=40, seed=0, device=CPU
        )


def test_activation_checkpointing_changes_no_gradient():
    tokens = torch.arange(32).view(2, 16)
    gradients = []
    for wanted in (False, True):
        model = build(activation_checkpointing=wanted)
        convert_model(model, SparsityConfig())
        assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules()) == wanted
        model(tokens, labels=tokens).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_maskless_attention_is_causal_attention(monkeypatch):
    asked = []
    look = masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(
        masking_utils,
        "find_packed_sequence_indices",
        lambda positions: (asked.append(positions), look(positions))[1],
    )
    model = build().eval()
    tokens = torch.arange(32).view(2, 16)
    with maskless_attention(model):
        assert model.config._attn_implementation == MASKLESS
        got = model(tokens, use_cache=False).logits
        assert not asked, "nothing is asked of the device"
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(tokens, use_cache=False).logits, got)
    assert asked, "transformers would have asked"


def test_windows_keep_their_masks(tmp_path):
    tiny_config("mistral", vocab_size=40, sliding_window=4).save_pretrained(tmp_path)
    model = build(source=str(tmp_path / "config.json"))
    with maskless_attention(model):
        assert model.config._attn_implementation == "sdpa"
    eager = build(attention="eager")
    with maskless_attention(eager):
        assert eager.config._attn_implementation == "eager"
