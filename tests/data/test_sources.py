import gzip
import json
import lzma
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_bitnet.core.errors import DataError, MissingExtraError
from sparse_bitnet.data import open_source

TEXTS = ["one", "two\nlines", "", "žluťoučký 数据 🙂", "five"]


def write_jsonl(path, texts, field="text"):
    data = "".join(json.dumps({field: t, "id": 1}) + "\n" for t in texts).encode()
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wb") as file:
        file.write(data)
    return path


def write_parquet(path, values, field="text"):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({field: values}), path, row_group_size=2)
    return path


def test_stdlib_is_the_library_without_its_tests():
    source = open_source("stdlib")
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [str(path.relative_to(root)) for path in source.files]
    assert names == sorted(names, key=lambda name: Path(name).parts)
    assert {"argparse.py", "json/decoder.py", "unittest/case.py"} <= set(names)
    unwanted = (
        "test/",
        "/tests/",
        "idle_test",
        "site-packages",
        "_sysconfigdata",
        "unittest/test/",
    )
    assert not [n for n in names if n.startswith("test/") or any(u in n for u in unwanted[1:])]
    assert source.size > 5_000_000
    first = next(iter(source))
    assert first == (root / names[0]).read_text(encoding="utf-8")
    assert open_source("stdlib").fingerprint == source.fingerprint


def test_text_from_a_file_a_directory_and_a_glob(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, text in [("b.txt", "B\r\n"), ("a.txt", "\ufeffA"), ("sub/c.md", "C")]:
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / ".hidden").write_text("no")
    assert list(open_source(f"text:{tmp_path / 'a.txt'}")) == ["A"]
    assert list(open_source(f"text:{tmp_path}")) == ["A", "B\r\n", "C"]
    assert list(open_source(f"text:{tmp_path}/*.txt")) == ["A", "B\r\n"]
    assert list(open_source(f"text:{tmp_path}/**/*.md")) == ["C"]


def test_relative_globs(tmp_path, monkeypatch):
    (tmp_path / "x[1].txt").write_text("literal")
    (tmp_path / "x1.txt").write_text("matched")
    monkeypatch.chdir(tmp_path)
    assert list(open_source("text:x[1].txt")) == ["literal"]  # a path that exists is not a glob
    assert list(open_source("text:x?.txt")) == ["matched"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz"])
def test_jsonl(tmp_path, name):
    path = write_jsonl(tmp_path / name, TEXTS)
    source = open_source(f"jsonl:{path}")
    assert list(source) == TEXTS
    assert [text for text, _ in source.read(3)] == TEXTS[3:]
    positions = [record.position for _, record in source.read()]
    assert positions == sorted(positions) and positions[-1] == source.size


def test_jsonl_field_directory_and_blank_lines(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", ["B"], "body")
    write_jsonl(tmp_path / "a.jsonl.gz", ["A"], "body")
    (tmp_path / "c.jsonl").write_bytes(b'\xef\xbb\xbf{"body": "C"}\r\n\r\n  \n{"body": "D"}')
    (tmp_path / "notes.txt").write_text("not data")
    source = open_source(f"jsonl:{tmp_path}#body")
    assert list(source) == ["A", "B", "C", "D"]
    assert [text for text, _ in source.read(2)] == ["C", "D"]


def test_parquet(tmp_path):
    write_parquet(tmp_path / "b.parquet", TEXTS[3:], "body")
    write_parquet(tmp_path / "a.parquet", TEXTS[:3], "body")
    source = open_source(f"parquet:{tmp_path}#body")
    assert list(source) == TEXTS
    assert [text for text, _ in source.read(4)] == TEXTS[4:]
    assert [record.position for _, record in source.read()][-1] == source.size


def test_hugging_face_dataset_from_a_directory(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("/dev/null/read-only"))
    write_jsonl(tmp_path / "train.jsonl", TEXTS)
    write_jsonl(tmp_path / "test.jsonl", ["held out"])
    source = open_source(f"hf:{tmp_path}")
    assert list(source) == TEXTS
    assert [text for text, _ in source.read(2)] == TEXTS[2:]
    assert list(open_source(f"hf:{tmp_path}::test")) == ["held out"]
    with pytest.raises(DataError, match=r"no field 'body'; it holds .*text.*: name one as PATH#F"):
        list(open_source(f"hf:{tmp_path}#body"))
    with pytest.raises(DataError, match="cannot be opened; check its name, configuration and"):
        open_source(f"hf:{tmp_path}::nosuch")
    with pytest.raises(DataError, match=r"use hf:NAME\[:CONFIG\]\[:SPLIT\]"):
        open_source("hf:a:b:c:d")


def test_hugging_face_fingerprint_follows_the_files(tmp_path):
    pytest.importorskip("datasets")
    write_jsonl(tmp_path / "train.jsonl", ["A"])
    before = open_source(f"hf:{tmp_path}").fingerprint
    assert open_source(f"hf:{tmp_path}").fingerprint == before
    write_jsonl(tmp_path / "train.jsonl", ["A", "B"])
    assert open_source(f"hf:{tmp_path}").fingerprint != before


@pytest.mark.parametrize(("kind", "library"), [("hf", "datasets"), ("parquet", "pyarrow")])
def test_missing_extra(tmp_path, monkeypatch, kind, library):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'sparse-bitnet\[data\]'"):
        open_source(f"{kind}:{tmp_path}")


def test_fingerprint_follows_the_content(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["A"])
    before = open_source(f"jsonl:{path}").fingerprint
    write_jsonl(path, ["A", "B"])
    assert open_source(f"jsonl:{path}").fingerprint != before


@pytest.mark.parametrize("spec", ["", "stdlib:x", "text", "text:", "csv:a.csv", "jsonl:"])
def test_unknown_spec(spec):
    with pytest.raises(DataError, match="is not understood: use stdlib, text:PATH, jsonl:PATH"):
        open_source(spec)


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_missing_path_and_no_match(tmp_path, kind):
    with pytest.raises(DataError, match=r"nowhere does not exist"):
        open_source(f"{kind}:{tmp_path}/nowhere")
    with pytest.raises(DataError, match=r"no file matches .*\*\.zzz"):
        open_source(f"{kind}:{tmp_path}/*.zzz")
    with pytest.raises(DataError, match=r"the directory .* holds no .* file"):
        open_source(f"{kind}:{tmp_path}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', r"a\.jsonl, line 2: not valid JSON .* the file is cut off"),
        (b"[" * 100_000, r"a\.jsonl, line 2: not valid JSON"),
        (b'["text"]', r"a\.jsonl, line 2: holds a list, not a JSON object"),
        (b'{"body": "x"}', r"line 2: no field 'text'; it holds body: name one as PATH#FIELD"),
        (b'{"text": 7}', r"line 2: field 'text' holds int, not text"),
        (b'{"text": null}', r"line 2: field 'text' holds NoneType, not text"),
        (b'{"text": "\xff"}', r"a\.jsonl, line 2: not UTF-8"),
        (b'{"text": "\\ud800"}', r"line 2: field 'text' is not valid Unicode .* at character 0"),
    ],
)
def test_bad_line(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message):
        list(open_source(f"jsonl:{path}"))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.xz"])
def test_truncated_damaged_or_foreign_compression(tmp_path, name):
    path = write_jsonl(tmp_path / name, [f"{i} {i * i}" for i in range(3000)])
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    for data in (whole[: len(whole) // 2], bytes(damaged), b'{"text": "plain"}\n'):
        path.write_bytes(data)
        with pytest.raises(DataError, match=rf"{name}: the compressed file is truncated or damag"):
            list(open_source(f"jsonl:{path}"))


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 ")
    with pytest.raises(DataError, match=r"a\.txt: not UTF-8 text .* at byte 3.*convert it"):
        list(open_source(f"text:{tmp_path}"))


def test_file_that_vanishes(tmp_path):
    for kind in ("text", "jsonl"):
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "x"}')
        source = open_source(f"{kind}:{path}")
        path.unlink()
        with pytest.raises(DataError, match=r"a\.jsonl: cannot be read: No such file"):
            list(source)


def test_bad_parquet(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["x"], "body")
    with pytest.raises(DataError, match=r"a\.parquet: no field 'text'; it holds body"):
        list(open_source(f"parquet:{path}"))
    write_parquet(path, ["x", None])
    with pytest.raises(DataError, match=r"a\.parquet, row 2: field 'text' holds NoneType"):
        list(open_source(f"parquet:{path}"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.parquet: not a readable Parquet file"):
        list(open_source(f"parquet:{path}"))


@settings(deadline=None, max_examples=40)
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=20), min_size=1, max_size=8),
    start=st.integers(0, 9),
)
def test_any_text_survives_jsonl(tmp_path_factory, texts, start):
    path = write_jsonl(tmp_path_factory.mktemp("any") / "a.jsonl.gz", texts)
    assert [text for text, _ in open_source(f"jsonl:{path}").read(start)] == texts[start:]
