import contextlib
import json
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from sparse_bitnet.core.errors import ConfigError, DataError
from sparse_bitnet.data import tokenizer as module
from sparse_bitnet.data.tokenizer import (
    EOS,
    Encoder,
    fair_sample,
    load_tokenizer,
    tokenizer_hash,
    train_bpe,
    vocabulary_size,
)


@pytest.fixture(scope="module")
def bpe(texts):
    return train_bpe(texts, 384)


def test_trained_tokenizer_survives_saving(bpe, tmp_path):
    bpe.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert tokenizer_hash(loaded) == tokenizer_hash(bpe)
    assert vocabulary_size(loaded) == len(loaded) <= 384
    assert loaded.eos_token == EOS
    text = (
        "naïve café 数据 🙂\r\n\tdef f(): return  x \x00"  # bytes that the training text lacks too
    )
    assert loaded.decode(loaded(text)["input_ids"]) == text


@pytest.mark.parametrize("config", [Qwen2Config(), LlamaConfig(), MistralConfig()])
def test_auto_tokenizer_agrees_beside_a_model(bpe, tmp_path, config):
    bpe.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    assert tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path)) == tokenizer_hash(bpe)
    assert tokenizer_hash(load_tokenizer(tmp_path)) == tokenizer_hash(bpe)


def test_a_foreign_splitting_is_kept_where_transformers_replaces_it(tmp_path):
    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, EOS: 2}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    ours = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)
    ours.save_pretrained(tmp_path)
    Qwen2Config().save_pretrained(tmp_path)
    assert tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path)) != tokenizer_hash(ours)
    assert tokenizer_hash(load_tokenizer(tmp_path)) == tokenizer_hash(ours)


def test_training_is_deterministic_across_processes(corpus):
    code = (
        "import sys; from sparse_bitnet.data import open_source, tokenizer_hash\n"
        "from sparse_bitnet.data.tokenizer import train_bpe\n"
        "print(tokenizer_hash(train_bpe(open_source(sys.argv[1]), 384)))"
    )
    spec = f"jsonl:{corpus}"
    run = subprocess.run([sys.executable, "-c", code, spec], capture_output=True, check=True)
    from sparse_bitnet.data import open_source

    assert run.stdout.decode().strip() == tokenizer_hash(train_bpe(open_source(spec), 384))


def test_encode_is_the_tokenizer_and_eos(bpe, texts):
    encoder = Encoder(bpe)
    expected = []
    for text in texts[:50]:
        expected += [*bpe(text)["input_ids"], bpe.eos_token_id]
    tokens = encoder.encode(texts[:50])
    assert tokens.tolist() == expected and tokens.dtype == np.uint32
    assert encoder.encode([]).size == 0


def test_special_tokens_in_the_text_stay_text(bpe):
    encoder = Encoder(bpe)
    tokens = encoder.encode([f"a{EOS}b"])
    assert (tokens == encoder.eos_id).sum() == 1 and tokens[-1] == encoder.eos_id
    assert bpe.decode(tokens[:-1]) == f"a{EOS}b"


def test_long_documents_are_cut_without_loss(bpe, texts, monkeypatch):
    whole = Encoder(bpe).encode(texts[:20])
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 40)
    documents = [*texts[:20], "x" * 500]  # no end of line to cut at
    tokens = Encoder(bpe).encode(documents)
    assert bpe.decode(tokens) == "".join(document + EOS for document in documents)
    assert abs(len(tokens) - len(whole)) < 0.1 * len(whole) + 500


def test_tokenizer_without_a_rust_half(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)
    encoder = Encoder(load_tokenizer(tmp_path))
    # ByT5's ids are the bytes + 3; "</s>" in the text is four characters, not the end.
    expected = [b + 3 for b in "é</s>".encode()] + [encoder.eos_id]
    assert encoder.encode(["é</s>"]).tolist() == expected
    assert encoder.vocab_size == vocabulary_size(encoder.tokenizer) > 256
    assert encoder.hash == tokenizer_hash(load_tokenizer(tmp_path))


def test_hash_tells_vocabularies_apart_but_not_padding(bpe, texts):
    before = tokenizer_hash(bpe)
    assert tokenizer_hash(train_bpe(texts, 300)) != before
    bpe.backend_tokenizer.enable_truncation(3)
    assert tokenizer_hash(bpe) == before
    assert len(Encoder(bpe).encode(["a long text that truncation would cut"])) > 4
    bpe.backend_tokenizer.no_truncation()


def test_fair_sample():
    documents = [f"{number:04d}" * 25 for number in range(1000)]  # 100 characters each
    assert fair_sample(documents, 100_000) == documents
    sample = fair_sample(documents, 20_000)
    assert len(sample) == 200 and sample == sorted(sample)
    numbers = [int(text[:4]) for text in sample]
    assert 400 < np.mean(numbers) < 600  # from everywhere
    assert set(sample) == set(fair_sample(documents[::-1], 20_000))
    assert fair_sample(["x" * 500, "y"], 100) in (["x" * 100], ["y"], ["x" * 100, "y"])
    assert fair_sample(["x" * 500], 100) == ["x" * 100]


def test_errors(tmp_path):
    with pytest.raises(ConfigError, match="--vocab-size is 256; a byte-level BPE needs at lea"):
        train_bpe(["text"], 256)
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        train_bpe([], 300)
    with pytest.raises(DataError, match="no tokenizer can be loaded from there; name a directory"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"cut')
    with pytest.raises(DataError, match="no tokenizer can be loaded from there"):
        load_tokenizer(tmp_path)


def test_hostile_tokenizers(bpe, tmp_path):
    bpe.save_pretrained(tmp_path)
    load_tokenizer(tmp_path)
    path, settings = tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"
    clean, good = json.loads(path.read_text()), json.loads(settings.read_text())
    first = next(iter(clean["model"]["vocab"]))
    # Read in, a list of four billion missing ids: the process would be gone.
    for edit in (
        {"model": clean["model"] | {"vocab": clean["model"]["vocab"] | {first: 2**32 - 1}}},
        {"added_tokens": [{**clean["added_tokens"][0], "id": 2**31}]},
    ):
        path.write_text(json.dumps(clean | edit))
        with pytest.raises(DataError, match=r"tokenizer\.json has token id \d{10}, but only"):
            load_tokenizer(tmp_path)
    # The library panics, which is no Exception.
    prefix = {"continuing_subword_prefix": "longer than any"}
    path.write_text(json.dumps(clean | {"model": clean["model"] | prefix}))
    with pytest.raises(DataError, match="no tokenizer can be loaded from there"):
        load_tokenizer(tmp_path)
    path.write_text(json.dumps(clean))
    settings.write_text(json.dumps(good | {"model_max_length": []}))
    with pytest.raises(DataError, match="no tokenizer can be loaded from there"):
        load_tokenizer(tmp_path)


def test_code_of_a_tokenizer_is_not_run(bpe, tmp_path, monkeypatch):
    bpe.save_pretrained(tmp_path / "bpe")
    (tmp_path / "bpe" / "own.py").write_text(
        f"open({str(tmp_path / 'trace')!r}, 'w')\nclass T: pass\n"
    )
    settings = tmp_path / "bpe" / "tokenizer_config.json"
    own = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["own.T", "own.T"]}}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | own))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with contextlib.suppress(DataError):
        load_tokenizer(tmp_path / "bpe")
    assert not (tmp_path / "trace").exists()


def test_tokenizer_without_eos():
    backend = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(DataError, match=r"words: has no EOS token.*set eos_token"):
        Encoder(PreTrainedTokenizerFast(tokenizer_object=backend), "words")
