import fcntl
import hashlib
import json
import lzma
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sparse_bitnet.core.errors import ConfigError, DataError
from sparse_bitnet.data import TokenShards, checked, prepare
from sparse_bitnet.data.tokenizer import load_tokenizer, vocabulary_size

# Of the corpus that conftest.py prepares.
SETTINGS = {"vocab_size": 384, "validation": 0.1, "shard_tokens": 10_000}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr("sparse_bitnet.data.encode.PORTION_BYTES", 4096)


@pytest.fixture(scope="module")
def tokenizer(prepared):
    return str(prepared / "tokenizer")


def files(out):
    """Everything that lies in a directory, but for when it was checked."""
    found = [path for path in out.rglob("*") if path.is_file() and path.name != checked.NAME]
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


def held_out(text, fraction):
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < fraction


def slow_reference(texts, tokenizer):
    tokens = []
    for text in texts:
        tokens += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return tokens


def test_both_splits_hold_their_documents(prepared, texts):
    tokenizer = load_tokenizer(prepared / "tokenizer")
    kept = {
        "train": [text for text in texts if not held_out(text, 0.1)],
        "validation": [text for text in texts if held_out(text, 0.1)],
    }
    assert 20 < len(kept["validation"]) < 60
    for split, documents in kept.items():
        shards = TokenShards(prepared / split)
        shards.verify()
        expected = slow_reference(documents, tokenizer)
        assert shards.tokens(0, shards.total_tokens).tolist() == expected
        assert shards.total_documents == len(documents)
        assert shards.total_bytes == sum(len(text.encode()) for text in documents)
        assert shards.vocab_size == vocabulary_size(tokenizer) and shards.dtype == np.dtype("<u2")
        assert shards.eos_id == tokenizer.eos_token_id
    train = TokenShards(prepared / "train")
    assert len(train.shards) > 2 and all(s.tokens >= 10_000 for s in train.shards[:-1])


def test_summary_and_reuse(corpus, tmp_path, tokenizer, capsys):
    first = prepare(f"jsonl:{corpus}", tmp_path / "out", tokenizer=tokenizer, validation=0.1)
    assert first["out"] == str(tmp_path / "out") and first["vocab_size"] == vocabulary_size(
        load_tokenizer(tokenizer)
    )
    train = TokenShards(tmp_path / "out" / "train")
    assert first["train"] == {
        "tokens": train.total_tokens,
        "documents": train.total_documents,
        "bytes": train.total_bytes,
        "shards": 1,
    }
    assert first["validation"]["documents"] + first["train"]["documents"] == 400
    assert first["reused"] is False and first["seconds"] > 0
    before = files(tmp_path / "out")
    again = prepare(f"jsonl:{corpus}", tmp_path / "out", tokenizer=tokenizer, validation=0.1)
    assert again["reused"] is True
    assert "already prepared" in capsys.readouterr().err
    assert {**again, "reused": 0, "seconds": 0} == {**first, "reused": 0, "seconds": 0}
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("workers", [1, 5])
def test_bytes_do_not_depend_on_workers(corpus, prepared, tmp_path, workers):
    prepare(f"jsonl:{corpus}", tmp_path, workers=workers, **SETTINGS)
    assert files(tmp_path) == files(prepared)


def test_the_held_out_documents_do_not_depend_on_the_order(texts, tmp_path, tokenizer):
    held = []
    for name, documents in [("forward", texts), ("twice backward", texts[::-1] + texts)]:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        prepare(f"jsonl:{path}", tmp_path / name, tokenizer=tokenizer, validation=0.1)
        shards = TokenShards(tmp_path / name / "validation")
        text = load_tokenizer(tokenizer).decode(shards.tokens(0, shards.total_tokens))
        held.append(set(text.split("<|endoftext|>")))
    assert held[0] == held[1]


def test_validation_from_another_source(corpus, texts, tmp_path, tokenizer):
    (tmp_path / "held.txt").write_text("held out text")
    out = tmp_path / "out"
    summary = prepare(
        f"jsonl:{corpus}",
        out,
        tokenizer=tokenizer,
        validation_source=f"text:{tmp_path / 'held.txt'}",
    )
    assert summary["train"]["documents"] == len(texts)
    shards = TokenShards(out / "validation")
    text = load_tokenizer(tokenizer).decode(shards.tokens(0, shards.total_tokens))
    assert text == "held out text<|endoftext|>"


def test_no_validation_empty_documents_and_a_limit(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl.xz"
    documents = ["é", "", "bb", "", "ccc", "dddd", ""]
    with lzma.open(path, "wt") as file:
        file.writelines(json.dumps({"body": text}) + "\n" for text in documents)
    whole = prepare(f"jsonl:{path}#body", tmp_path / "1", tokenizer=tokenizer, validation=0)
    assert whole["validation"] is None and not (tmp_path / "1" / "validation").exists()
    assert (whole["train"]["documents"], whole["train"]["bytes"]) == (4, 11)
    part = prepare(
        f"jsonl:{path}#body", tmp_path / "2", tokenizer=tokenizer, validation=0, max_bytes=5
    )
    assert (part["train"]["documents"], part["train"]["bytes"]) == (3, 7)  # the third reaches 5


def test_large_vocabulary_takes_uint32(corpus, tmp_path, tokenizer, texts):
    shutil.copytree(tokenizer, tmp_path / "wide")
    state = json.loads((tmp_path / "wide" / "tokenizer.json").read_text())
    state["model"]["vocab"] |= {f"<extra {id}>": id for id in range(384, 70_384)}
    (tmp_path / "wide" / "tokenizer.json").write_text(json.dumps(state))
    wide = load_tokenizer(tmp_path / "wide")
    prepare(f"jsonl:{corpus}", tmp_path / "out", tokenizer=str(tmp_path / "wide"), validation=0)
    shards = TokenShards(tmp_path / "out" / "train")
    assert shards.dtype == np.dtype("<u4") and shards.vocab_size == 70_384
    assert shards.tokens(0, 500).tolist() == slow_reference(texts[:20], wide)[:500]


# Each point at which a run is killed: the function, and the call of it that does not return.
KILLS = [
    ("prepare:train_bpe", 1),
    ("journal:Journal.save", 1),  # the tokenizer in place, but not noted
    ("encode:_ShardWriter.add", 4),  # in the middle of a shard
    ("journal:Journal.save", 2),  # the first part in place, but not noted
    ("encode:PartWriter.finish", 2),  # in the second part
    ("prepare:write_text", 2),  # one index written, the other not
    ("journal:Journal.save", 1),  # everything but the last note
]

KILLER = """
import importlib, os, signal, sys
import sparse_bitnet.data.encode as encode
from sparse_bitnet.data import prepare
encode.PORTION_BYTES = 4096
source, out, *kills = sys.argv[1:]
for kill in kills:
    module, name, count = kill.split(":")
    if os.fork() == 0:  # each run is a process of its own, without the seconds of importing
        owner = importlib.import_module("sparse_bitnet.data." + module)
        *path, name = name.split(".")
        for step in path:
            owner = getattr(owner, step)
        original, calls = getattr(owner, name), []
        def deadly(*args, **kwargs):
            calls.append(name)
            if len(calls) == int(count):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)
        setattr(owner, name, deadly)
        prepare(source, out, vocab_size=384, validation=0.1, shard_tokens=10_000, workers=2)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_killed_runs_go_on_to_the_same_bytes(corpus, prepared, tmp_path):
    out = tmp_path / "out"
    arguments = [f"jsonl:{corpus}", str(out), *(f"{name}:{count}" for name, count in KILLS)]
    run = subprocess.run(
        [sys.executable, "-c", KILLER, *arguments], capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["-9"] * len(KILLS), run.stderr
    assert json.loads((out / "prepare.json").read_text())["finished"] is False
    summary = prepare(f"jsonl:{corpus}", out, **SETTINGS)
    assert summary["reused"] is False
    assert files(out) == files(prepared)


def lose(train):
    (train / "00002.bin").unlink()
    os.truncate(train / "00003.bin", 10)


def flip(train):
    data = bytearray((train / "00001.bin").read_bytes())
    data[14] ^= 1
    (train / "00001.bin").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "reused"),
    [
        (lambda train: (train / "index.json").write_text("edited"), True),
        (lose, False),
        (flip, False),
    ],
)
def test_damaged_parts_are_made_again(corpus, prepared, tmp_path, damage, reused):
    out = Path(shutil.copytree(prepared, tmp_path / "out"))
    damage(out / "train")
    assert prepare(f"jsonl:{corpus}", out, **SETTINGS)["reused"] == reused
    assert files(out) == files(prepared)


def test_other_settings_are_refused_by_name(corpus, prepared, tmp_path, tokenizer):
    out = Path(shutil.copytree(prepared, tmp_path / "out"))
    spec = f"jsonl:{corpus}"
    for change, message in [
        ({"vocab_size": 300}, "tokenizer was 'byte-level BPE of 384', now 'byte-level BPE of 300'"),
        ({"validation": 0.2}, r"validation was 0\.1, now 0\.2"),
        ({"shard_tokens": 5, "max_bytes": 9}, "max_bytes was None, now 9; shard_tokens was 10000,"),
        ({"validation_source": spec}, r"validation was 0\.1, now 'jsonl:"),
        ({"vocab_size": None, "tokenizer": tokenizer}, "tokenizer was 'byte-level BPE of 384', no"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            prepare(spec, out, **{**SETTINGS, **change})
        assert "prepare with --overwrite" in str(caught.value)
    with pytest.raises(DataError, match=r"source was 'jsonl:.*', now 'stdlib'"):
        prepare("stdlib", out, **SETTINGS)
    edited = tmp_path / "edited.jsonl"
    edited.write_bytes(corpus.read_bytes())
    prepare(f"jsonl:{edited}", tmp_path / "2", **SETTINGS)
    edited.write_bytes(corpus.read_bytes() * 2)
    with pytest.raises(DataError, match="files was"):
        prepare(f"jsonl:{edited}", tmp_path / "2", **SETTINGS)
    assert prepare(f"jsonl:{edited}", tmp_path / "2", overwrite=True, **SETTINGS)["reused"] is False


def test_overwrite_starts_afresh(corpus, tmp_path, tokenizer):
    settings = {"tokenizer": tokenizer, "validation": 0.1}
    prepare(f"jsonl:{corpus}", tmp_path, shard_tokens=10_000, **settings)
    prepare(f"jsonl:{corpus}", tmp_path, overwrite=True, **settings)
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == [
        ".checked.json",
        "00000.bin",
        "index.json",
    ]
    (tmp_path / "prepare.json").write_text("{}")
    with pytest.raises(DataError, match=r"prepare\.json: damaged or of another version"):
        prepare(f"jsonl:{corpus}", tmp_path, **settings)
    prepare(f"jsonl:{corpus}", tmp_path, overwrite=True, **settings)


@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_directories_are_left_alone(corpus, tmp_path, tokenizer, overwrite):
    (tmp_path / "thesis.partial").write_text("precious")
    spec = f"jsonl:{corpus}"
    with pytest.raises(DataError, match=r"holds thesis\.partial, which data preparation did not"):
        prepare(spec, tmp_path, tokenizer=tokenizer, overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.partial"]
    with pytest.raises(DataError, match="is a file; name a directory"):
        prepare(spec, tmp_path / "thesis.partial", tokenizer=tokenizer, overwrite=overwrite)


def test_two_runs_at_once(corpus, tmp_path, tokenizer):
    with (tmp_path / "prepare.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another run is preparing it; wait for it to end"):
            prepare(f"jsonl:{corpus}", tmp_path, tokenizer=tokenizer)
    prepare(f"jsonl:{corpus}", tmp_path, tokenizer=tokenizer)


def test_edited_tokenizer(corpus, prepared, tmp_path):
    out = Path(shutil.copytree(prepared, tmp_path / "out"))
    path = out / "tokenizer" / "tokenizer.json"
    state = json.loads(path.read_text())
    state["model"]["merges"].pop()
    path.write_text(json.dumps(state))
    with pytest.raises(DataError, match="tokenizer: not the tokenizer that this preparation began"):
        prepare(f"jsonl:{corpus}", out, **SETTINGS)


def test_sources_without_enough_text(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    spec = f"jsonl:{path}"
    path.write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="the source holds no text"):
        prepare(spec, tmp_path / "1", tokenizer=tokenizer)
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        prepare(spec, tmp_path / "2", vocab_size=300)
    path.write_text('{"text": "one"}\n')
    with pytest.raises(DataError, match="nothing was held out, of 1 documents; raise --validation"):
        prepare(spec, tmp_path / "3", tokenizer=tokenizer)
    with pytest.raises(DataError, match="every document was held out and none is left"):
        prepare(spec, tmp_path / "4", tokenizer=tokenizer, validation=1 - 2**-53)
    # What the messages advise works in the same place.
    for name in ("3", "4"):
        assert (
            prepare(spec, tmp_path / name, tokenizer=tokenizer, validation=0)["validation"] is None
        )


def test_a_bad_line_in_the_middle_leaves_a_resumable_directory(texts, tmp_path, tokenizer):
    path, out = tmp_path / "a.jsonl", tmp_path / "out"
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    path.write_text("".join([*lines, '{"text": "cut']))
    settings = {"tokenizer": tokenizer, "validation": 0.1, "shard_tokens": 10_000}
    with pytest.raises(DataError, match=r"a\.jsonl, line 401: not valid JSON"):
        prepare(f"jsonl:{path}", out, **settings)
    assert not list(out.rglob("*.partial")) and not list(out.rglob("index.json"))
    with pytest.raises(DataError, match=r"index\.json: missing"):
        TokenShards(out / "train")


def test_a_corrected_source_goes_where_the_wrong_one_gave_no_shard(texts, tmp_path, tokenizer):
    path, out = tmp_path / "a.jsonl", tmp_path / "out"
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    for last in ('{"text": "cut', '{"text": "whole"}'):
        path.write_text("".join([*lines, last]))
        if last.endswith("cut"):
            with pytest.raises(DataError, match="not valid JSON"):
                prepare(f"jsonl:{path}", out, tokenizer=tokenizer)
    assert prepare(f"jsonl:{path}", out, vocab_size=300)["vocab_size"] == 300


def test_settings_out_of_range(tmp_path):
    for settings, message in [
        (
            {"tokenizer": "x", "vocab_size": 9},
            "--vocab-size is for training a tok.*, and x has one",
        ),
        ({"validation": 1.0}, r"--validation is 1\.0; it is a fraction"),
        ({"validation": -0.1}, r"validation is -0\.1"),
        ({"validation": float("nan")}, "validation is nan"),
        ({"max_bytes": 0}, "--max-bytes is 0; it must be at least 1"),
        ({"shard_tokens": 0}, "--shard-tokens is 0; it must be at least 1"),
        ({"workers": 0}, "--workers is 0; it must be at least 1"),
    ]:
        with pytest.raises(ConfigError, match=message):
            prepare("stdlib", tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_environment_is_left_as_it_was(corpus, tmp_path, tokenizer, monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    prepare(f"jsonl:{corpus}", tmp_path / "1", tokenizer=tokenizer)
    assert "TOKENIZERS_PARALLELISM" not in os.environ
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    prepare(f"jsonl:{corpus}", tmp_path / "2", tokenizer=tokenizer)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
