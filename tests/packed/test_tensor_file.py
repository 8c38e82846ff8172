"""Files the safetensors library can read, and suspicion towards those it could not have written."""

import json
import struct
import zlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sparse_bitnet.core import PackedFormatError
from sparse_bitnet.packed import tensor_file
from sparse_bitnet.packed.tensor_file import (
    DTYPES,
    TensorFileWriter,
    checksum,
    checksum_metadata,
    parse_json,
    read_header,
    verify_checksums,
)


def tensors():
    torch.manual_seed(0)
    return {
        "bytes": torch.randint(0, 256, (3, 7), dtype=torch.uint8),
        "scale": torch.randn(2),
        "half": torch.randn(3, 5).to(torch.bfloat16),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "flags": torch.tensor([True, False, True]),
        "strided": torch.randn(4, 6).t(),
    }


def write(path, values):
    writer = TensorFileWriter(path, {n: (t.dtype, tuple(t.shape)) for n, t in values.items()})
    for name in reversed(values):  # any order
        writer.write(name, values[name])
    writer.close()


@pytest.mark.parametrize("block", [8, 64, 2**22])
def test_safetensors_reads_what_is_written(tmp_path, monkeypatch, block):
    monkeypatch.setattr(tensor_file, "BLOCK", block)
    values = tensors()
    path = tmp_path / "model.safetensors"
    write(path, values)
    loaded = load_file(path)
    assert loaded.keys() == values.keys()
    for name, tensor in values.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        crc = f"{zlib.crc32(values['bytes'].numpy().tobytes()):08x}"
        assert file.metadata()["crc32:bytes"] == crc == checksum(values["bytes"])
    header = read_header(path)
    assert set(verify_checksums(path, header)) == set(values)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype(tmp_path, dtype):
    values = {"x": torch.tensor([[0, 1, 1]]).to(dtype)}
    write(tmp_path / "f", values)
    assert torch.equal(load_file(tmp_path / "f")["x"], values["x"])
    assert read_header(tmp_path / "f").tensors["x"].dtype == dtype


def test_reads_what_safetensors_writes(tmp_path):
    values = {name: tensor.contiguous() for name, tensor in tensors().items()}
    save_file(values, tmp_path / "f", metadata=checksum_metadata(values))
    assert set(verify_checksums(tmp_path / "f", read_header(tmp_path / "f"))) == set(values)


def test_writer_insists_on_its_layout(tmp_path):
    writer = TensorFileWriter(tmp_path / "f", {"x": (torch.float32, (2,))})
    with pytest.raises(ValueError, match=r"x: the layout says torch.float32 \(2,\), not"):
        writer.write("x", torch.zeros(3))
    with pytest.raises(ValueError, match="tensors were never written: \\['x'\\]"):
        writer.close()
    writer.abandon()  # a file that was not finished has no header
    with pytest.raises(PackedFormatError, match="not valid JSON"):
        read_header(tmp_path / "f")


def entry(dtype="U8", shape=(4,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def put(path, header, data=b"abcd"):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json", "not valid JSON"),
        (b"[1, 2]", "not valid JSON .it is not an object"),
        (b'{"a": 1, "a": 2}', "a key is repeated"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        ({"x": 5}, "entry of tensor 'x' is 5, which makes no sense"),
        ({"x": entry(dtype="F99")}, "makes no sense"),
        ({"x": entry(dtype=["U8"])}, "makes no sense"),
        ({"x": entry(shape=(5,))}, "makes no sense"),
        ({"x": entry(shape=(-4,))}, "makes no sense"),
        ({"x": entry(shape=(4.0,))}, "makes no sense"),
        ({"x": entry(shape=(True, 4))}, "makes no sense"),
        ({"x": entry(shape=(1,) * 60 + (4,))}, "makes no sense"),
        ({"x": entry(shape=(2**62, 2**62))}, "makes no sense"),
        ({"x": entry(shape=(2**70,), offsets=(0, 2**70))}, "makes no sense"),
        ({"x": entry(offsets=(4, 0))}, "makes no sense"),
        ({"x": entry(offsets=(0, 4, 8))}, "makes no sense"),
        ({"x": {"dtype": "U8", "shape": [4]}}, "makes no sense"),
        ({"x": entry(shape=(10**12,), offsets=(0, 10**12))}, "describes 10000000000"),
        ({"x": entry(), "y": entry()}, "tensor y begins at byte 0 where 4 was expected"),
        ({"x": entry(shape=(3,), offsets=(1, 4))}, "tensor x begins at byte 1 where 0"),
        ({"x": entry(shape=(3,), offsets=(0, 3))}, "but the file has"),
        ({}, "but the file has"),
        ({"x": entry(), "__metadata__": {"a": 1}}, "the header's metadata is not text"),
        ({"x": entry(), "__metadata__": []}, "the header's metadata is not text"),
    ],
)
def test_headers_that_are_refused(tmp_path, header, message):
    put(tmp_path / "f", header)
    with pytest.raises(PackedFormatError, match=message):
        read_header(tmp_path / "f")


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**8 + 1, 5])
def test_giant_header_lengths(tmp_path, length):
    (tmp_path / "f").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(PackedFormatError, match=f"header claims {length} bytes in a file of 10"):
        read_header(tmp_path / "f")


@pytest.mark.parametrize("data", [b"", b"1234567", b"\x80\x04."])
def test_files_too_short_for_a_header(tmp_path, data):
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(PackedFormatError, match="truncated or not a safetensors file"):
        read_header(tmp_path / "f")


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(PackedFormatError, match="cannot be read"):
        read_header(tmp_path / "nothing")
    with pytest.raises(PackedFormatError):
        read_header(tmp_path)


def test_every_flipped_bit_is_found(tmp_path):
    path = tmp_path / "f"
    values = {"x": torch.arange(6, dtype=torch.uint8), "y": torch.ones(2)}
    write(path, values)
    header = read_header(path)
    clean = path.read_bytes()
    for byte in range(header.data, len(clean)):
        damaged = bytearray(clean)
        damaged[byte] ^= 1 << byte % 8
        path.write_bytes(damaged)
        with pytest.raises(PackedFormatError, match=r"is not what was written \(CRC-32"):
            list(verify_checksums(path, header))


def test_a_tensor_without_a_checksum(tmp_path):
    save_file({"x": torch.ones(2)}, tmp_path / "f")
    with pytest.raises(PackedFormatError, match="tensor x has no checksum; the file was not wr"):
        list(verify_checksums(tmp_path / "f", read_header(tmp_path / "f")))


def test_parse_json_refuses_other_encodings(tmp_path):
    with pytest.raises(PackedFormatError, match="not valid JSON"):
        parse_json('{"a": 1}'.encode("utf-16"), tmp_path / "f")
