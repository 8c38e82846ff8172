import json
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_bitnet.core.errors import DataError
from sparse_bitnet.data import TokenShards
from sparse_bitnet.data import shards as shards_module
from sparse_bitnet.data.shards import token_dtype
from sparse_bitnet.files import LARGEST_JSON


@pytest.fixture
def copy(tmp_path, prepared):
    """The training shards, free to be damaged."""
    return Path(shutil.copytree(prepared / "train", tmp_path / "train"))


def edit(directory, change):
    path = directory / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def all_tokens(directory):
    files = sorted(directory.glob("*.bin"))
    return np.concatenate([np.fromfile(file, "<u2") for file in files]).astype(np.int64)


def test_tokens_across_shards(prepared):
    shards = TokenShards(prepared / "train")
    everything = all_tokens(shards.path)
    assert len(shards.shards) > 2
    assert shards.total_tokens == len(everything)
    assert (shards.tokens(0, len(everything)) == everything).all()
    assert shards.tokens(3, 0).size == 0
    assert shards.tokens(0, 5).dtype == np.int64
    shards.verify()


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_windows_are_slices(prepared, data):
    shards, everything = TokenShards(prepared / "train"), all_tokens(prepared / "train")
    length = data.draw(st.integers(0, len(everything)))
    starts = data.draw(st.lists(st.integers(0, len(everything) - length), max_size=5))
    windows = shards.windows(np.array(starts, dtype=np.uint64), length)
    assert windows.shape == (len(starts), length)
    for start, window in zip(starts, windows, strict=True):
        assert (window == everything[start : start + length]).all()


def test_reading_beyond_the_end(prepared):
    shards = TokenShards(prepared / "train")
    total = shards.total_tokens
    for start, count in ((total, 1), (-1, 2), (0, total + 1), (total - 2, 3)):
        with pytest.raises(DataError, match=f"tokens {start} to {start + count} asked of {total}"):
            shards.tokens(start, count)


def test_few_maps_are_held_open(prepared, monkeypatch):
    monkeypatch.setattr("sparse_bitnet.data.shards.OPEN_SHARDS", 1)
    shards = TokenShards(prepared / "train")
    for _ in range(2):
        assert (shards.tokens(0, shards.total_tokens) == all_tokens(shards.path)).all()


def test_dtype_follows_the_vocabulary():
    assert token_dtype(1 << 16) == np.dtype("<u2")
    assert token_dtype((1 << 16) + 1) == np.dtype("<u4")


def test_missing_directory_index_or_shard(copy, tmp_path):
    with pytest.raises(DataError, match="nowhere: no such directory; make it with"):
        TokenShards(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"index\.json: missing; the directory is not token shards"):
        TokenShards(tmp_path)
    (copy / "00001.bin").unlink()
    with pytest.raises(DataError, match=r"00001\.bin: named by the index, but missing"):
        TokenShards(copy)
    (copy / "00001.bin").mkdir()
    with pytest.raises(DataError, match=r"00001\.bin: named by the index, but missing"):
        TokenShards(copy)


@pytest.mark.parametrize("change", [-1, -2, 2])
def test_truncated_or_grown_shard(copy, change):
    path = copy / "00002.bin"
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + b"\0" * change)
    with pytest.raises(
        DataError, match=rf"00002\.bin: {len(data) + change} bytes, but the index s"
    ):
        TokenShards(copy)


def flip(path):
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


@pytest.fixture
def reads(monkeypatch):
    """Names of the shards that are read to be checked."""
    names = []
    read = shards_module._read

    def counted(path, *rest):
        names.append(path.name)
        return read(path, *rest)

    monkeypatch.setattr(shards_module, "_read", counted)
    return names


def test_a_flipped_bit_is_found_by_whoever_opens(copy):
    flip(copy / "00001.bin")
    for _ in range(2):  # and nothing is remembered of it
        with pytest.raises(DataError, match=r"00001\.bin: its sha256 is not the index's"):
            TokenShards(copy)


def test_a_file_is_read_once_until_it_changes(copy, reads):
    names = sorted(path.name for path in copy.glob("*.bin"))
    TokenShards(copy)  # a copy: what was remembered of the originals does not count
    assert reads == names
    TokenShards(copy)
    assert reads == names
    flip(copy / "00002.bin")
    flip(copy / "00002.bin")
    TokenShards(copy)
    assert reads == [*names, "00002.bin"]
    TokenShards(copy).verify()
    assert reads == [*names, "00002.bin", *names]


def test_an_edit_that_keeps_size_and_time_is_seen(copy, reads):
    path = copy / "00000.bin"
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    TokenShards(copy)
    flip(path)
    os.utime(path, ns=times)
    with pytest.raises(DataError, match=r"00000\.bin: its sha256"):
        TokenShards(copy)


def test_where_checks_are_remembered(copy, reads, tmp_path, monkeypatch):
    """Beside the files, else in the user's cache, else nowhere."""
    monkeypatch.setenv("SPARSE_BITNET_CACHE", str(tmp_path / "cache"))
    count = len(list(copy.glob("*.bin")))
    (copy / ".checked.json").unlink(missing_ok=True)
    (copy / ".checked.json").mkdir()  # as good as forbidden
    for _ in range(2):
        TokenShards(copy)
    assert len(reads) == count
    assert len(list((tmp_path / "cache" / "checked").iterdir())) == 1
    (tmp_path / "no").touch()
    monkeypatch.setenv("SPARSE_BITNET_CACHE", str(tmp_path / "no"))
    for _ in range(2):
        TokenShards(copy)
    assert len(reads) == 3 * count


def test_a_memory_that_is_a_pipe_is_neither_read_nor_replaced(copy, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (copy / ".checked.json").unlink(missing_ok=True)
    (copy / ".checked.json").symlink_to(tmp_path / "pipe")
    TokenShards(copy)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"00000.bin": 1}', '{"00000.bin": [[], 0, ""]}'])
def test_a_damaged_memory_is_forgotten(copy, reads, text):
    (copy / ".checked.json").write_text(text)
    TokenShards(copy)
    assert "00000.bin" in reads


def test_tokens_beyond_the_vocabulary_are_found(copy):
    TokenShards(copy)
    edit(copy, lambda index: index.update(vocab_size=100))
    with pytest.raises(
        DataError, match=r"00000\.bin: holds token id \d+, but the vocabulary has 1"
    ):
        TokenShards(copy)


def test_wrong_vocabulary(prepared):
    shards = TokenShards(prepared / "train")
    shards.require_tokenizer(shards.tokenizer_hash)
    shards.require_vocabulary(shards.vocab_size)
    shards.require_vocabulary(shards.vocab_size + 100)  # embeddings are often padded
    with pytest.raises(DataError, match="shard of the wrong vocabulary: made by tokenizer"):
        shards.require_tokenizer("0" * 64)
    with pytest.raises(DataError, match=r"\d{3} tokens, the model has 10; prepare the"):
        shards.require_vocabulary(10)


def shard_change(**values):
    return lambda index: index["shards"][0].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda i: i.update(format="other"),
            "format is 'other': Input should be 'sparse-bitnet",
        ),
        (lambda i: i.update(version=3), "version is 3: Input should be less than or equal to 2"),
        (lambda i: i.update(version=2), "bytes, but the index says"),
        (lambda i: i.update(version=True), "version is True: Input should be a valid integer"),
        (lambda i: i.pop("eos_id"), "eos_id is .*: Field required"),
        (lambda i: i.update(vocab_size=0), "vocab_size is 0"),
        (lambda i: i.update(vocab_size=1 << 40), "vocab_size is 1099511627776"),
        (
            lambda i: i.update(dtype="uint32"),
            "dtype is 'uint32', that vocabulary is kept",
        ),
        (lambda i: i.update(dtype="object"), "dtype is 'object'"),
        (lambda i: i.update(eos_id=-1), "eos_id is -1"),
        (lambda i: i.update(eos_id=10_000), "eos_id is 10000"),
        (lambda i: i.update(tokenizer_hash="x" * 500), "tokenizer_hash is 'xxx.*\\.\\.\\.xx"),
        (lambda i: i.update(shards=[]), r"shards is \[\]: List should have at least 1"),
        (lambda i: i.update(shards={"0": 1}), "shards is {'0': 1}: Input should be a valid list"),
        (lambda i: i["shards"].append(i["shards"][0]), "a shard is named twice"),
        (lambda i: i["shards"][0].pop("bytes"), r"shards\.0\.bytes is .*: Field required"),
        (shard_change(extra=1), r"shards\.0\.extra is 1: Unexpected keyword argument"),
        (shard_change(file="../train/00000.bin"), r"'\.\./train/00000\.bin': String should match"),
        (shard_change(file="/etc/passwd"), "'/etc/passwd': String should match"),
        (shard_change(file=".."), "String should match"),
        (shard_change(file="00000.bin\n"), "String should match"),
        (shard_change(file="0\0.bin"), "String should match"),
        (shard_change(file=None), "file is None: Input should be a valid string"),
        (shard_change(tokens=0), "tokens is 0: Input should be greater than or equal to 1"),
        (shard_change(tokens=2.0), "tokens is 2.0: Input should be a valid integer"),
        (shard_change(tokens=True), "tokens is True: Input should be a valid integer"),
        (shard_change(tokens=1 << 70), "tokens is .*: Input should be less than"),
        (shard_change(tokens=1 << 60), "bytes, but the index says"),
        (shard_change(documents=1 << 30), "shard 00000.bin has more documents than tokens"),
        (shard_change(sha256="Z" * 64), "sha256 is 'ZZ.*: String should match"),
    ],
)
def test_edited_index(copy, change, message):
    edit(copy, change)
    with pytest.raises(DataError, match=message):
        TokenShards(copy)


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "{", '"' * 9, "[" * 100_000, '{"format": ' + "9" * 5000 + "}", "\ud800"],
)
def test_index_that_is_no_index(copy, text):
    (copy / "index.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(DataError, match=r"index\.json: not (valid JSON|an index of)"):
        TokenShards(copy)


def test_giant_index(copy):
    with (copy / "index.json").open("ab") as file:
        file.truncate(LARGEST_JSON + 1)  # sparse: takes no space
    with pytest.raises(DataError, match="longer than 67108864 bytes"):
        TokenShards(copy)
