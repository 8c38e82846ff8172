"""Files the safetensors library can read, and suspicion towards those it could not have written."""

import json
import struct
import zlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sparse_bitnet.core import PackedFormatError
from sparse_bitnet.packed.tensor_file import (
    DTYPES,
    checksum_metadata,
    file_size,
    read_tensors,
    verify_checksums,
    write_tensors,
)


def tensors():
    torch.manual_seed(0)
    return {
        "scale": torch.randn(2),
        "half": torch.randn(3, 5).to(torch.bfloat16),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "strided": torch.randn(4, 6).t(),
        **{str(dtype): torch.tensor([[0, 1, 1]]).to(dtype) for dtype in DTYPES},
    }


def test_safetensors_reads_what_is_written(tmp_path):
    values, path = tensors(), tmp_path / "model.safetensors"
    write_tensors(path, values)
    loaded = load_file(path)
    assert loaded.keys() == values.keys()
    for name, tensor in values.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        crc = f"{zlib.crc32(values['scale'].numpy().tobytes()):08x}"
        assert file.metadata()["crc32:scale"] == crc
    verify_checksums(read_tensors(path))
    meta = {name: tensor.to("meta") for name, tensor in values.items()}
    assert file_size(meta) == path.stat().st_size


def test_reads_what_safetensors_writes(tmp_path):
    values = {name: tensor.contiguous() for name, tensor in tensors().items()}
    save_file(values, tmp_path / "f", metadata=checksum_metadata(values))
    verify_checksums(read_tensors(tmp_path / "f"))


def entry(dtype="U8", shape=(4,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[1, 2]",
        {"x": 5},
        {"x": entry(dtype="F99")},
        {"x": entry(shape=(5,))},
        {"x": entry(shape=(2**62, 2**62))},
        {"x": entry(shape=(2**70,), offsets=(0, 2**70))},
        {"x": entry(shape=(10**12,), offsets=(0, 10**12))},
        {"x": entry(), "y": entry()},
        {"x": entry(shape=(3,), offsets=(0, 3))},
        {"x": entry(), "__metadata__": {"a": 1}},
    ],
)
def test_headers_that_are_refused(tmp_path, header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "f").write_bytes(struct.pack("<Q", len(text)) + text + b"abcd")
    with pytest.raises(PackedFormatError, match=r"/f: truncated, damaged or not a safetensors"):
        read_tensors(tmp_path / "f")


@pytest.mark.parametrize(
    "data",
    [b"", b"1234567", b"\x80\x04.", *(struct.pack("<Q", n) + b"{}" for n in (2**63, 10**8 + 1, 5))],
)
def test_files_too_short_for_their_header(tmp_path, data):
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(PackedFormatError, match="truncated, damaged or not a safetensors file"):
        read_tensors(tmp_path / "f")


def test_missing_file_and_directory(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(PackedFormatError, match="cannot be read"):
            read_tensors(path)


def test_every_flipped_bit_is_found(tmp_path):
    path = tmp_path / "f"
    values = {"x": torch.arange(6, dtype=torch.uint8), "y": torch.ones(2)}
    write_tensors(path, values)
    clean = path.read_bytes()
    for byte in range(len(clean) - 14, len(clean)):
        damaged = bytearray(clean)
        damaged[byte] ^= 1 << byte % 8
        path.write_bytes(damaged)
        with pytest.raises(PackedFormatError, match=r"is not what was written \(CRC-32"):
            verify_checksums(read_tensors(path))


def test_a_tensor_without_a_checksum(tmp_path):
    save_file({"x": torch.ones(2)}, tmp_path / "f")
    with pytest.raises(PackedFormatError, match="tensor x has no checksum; the file was not wr"):
        verify_checksums(read_tensors(tmp_path / "f"))
