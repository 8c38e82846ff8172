"""GGUF files as ordinary directories."""

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from transformers import AutoTokenizer

from packed_models import write_trained
from sparse_bitnet.core import CheckpointError, ConfigError
from sparse_bitnet.data.tokenizer import train_bpe
from sparse_bitnet.export.gguf.read import import_gguf
from sparse_bitnet.export.gguf.write import export_gguf
from sparse_bitnet.export.verbs import import_checkpoint
from sparse_bitnet.nn import SparseBitLinear
from sparse_bitnet.train import load_trained
from sparse_bitnet.train.dense import read_dense

TEXT = "def main():\n    return the name of the file 1234\n"


def test_a_file_that_we_wrote(tmp_path, monkeypatch):
    sizes = {"hidden_size": 256, "intermediate_size": 256}
    tokenizer = train_bpe([TEXT] * 30, 320)
    write_trained(tmp_path / "trained", tokenizer, **sizes)
    export_gguf(tmp_path / "trained", tmp_path / "m.gguf", embeddings="f32")
    (tmp_path / "sha256-1f").write_bytes((tmp_path / "m.gguf").read_bytes())
    result = import_checkpoint(tmp_path / "sha256-1f", tmp_path / "dense")
    assert str(result).startswith(f"{tmp_path / 'dense'}: Qwen2ForCausalLM with ")
    found = read_dense(tmp_path / "dense", exact=True)
    expected, _ = load_trained(tmp_path / "trained")
    weights = {name: p.detach() for name, p in expected.named_parameters()}
    for name, module in expected.named_modules():
        if isinstance(module, SparseBitLinear):
            ternary, scale, _ = module.derived()
            weights[f"{name}.weight"] = ternary * scale.half().float()
    assert all(torch.equal(p, weights[name]) for name, p in found.named_parameters())
    assert AutoTokenizer.from_pretrained(tmp_path / "dense")(TEXT) == tokenizer(TEXT)
    with pytest.raises(ConfigError, match=r"exists; .*--overwrite"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "dense")
    with pytest.raises(ConfigError, match="trained exists and is not a dense model"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "trained", overwrite=True)
    import_gguf(tmp_path / "m.gguf", tmp_path / "dense", overwrite=True)
    (tmp_path / "m.txt").write_text("GGU")
    for name in ("m.txt", "nowhere.gguf"):
        with pytest.raises(ConfigError, match=f"{name}: there is no such"):
            import_checkpoint(tmp_path / name, tmp_path / "out")
    # Other files of a folder of downloads are not of this model; a lost tensor is not made up.
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "a": ')
    (tmp_path / "generation_config.json").write_text('{"temperature": 7.0, "do_sample": true}')
    # Nor is one of another name in the current directory, where transformers looks first.
    write_trained(tmp_path / "else", tokenizer, **sizes, initializer_range=0.5)
    export_gguf(tmp_path / "else", tmp_path / "model.gguf", embeddings="f32")
    monkeypatch.chdir(tmp_path)
    import_gguf(tmp_path / "m.gguf", tmp_path / "again")
    again = read_dense(tmp_path / "again", exact=True)
    assert all(torch.equal(p, weights[name]) for name, p in again.named_parameters())
    assert "temperature" not in (tmp_path / "again" / "generation_config.json").read_text()
    data = (
        (tmp_path / "m.gguf").read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight")
    )
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"no tensor for model\.layers\.1\.mlp\.up_proj"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "other")
    with pytest.raises(ConfigError, match="without a pattern"):
        import_checkpoint(tmp_path / "m.gguf", tmp_path / "other", pattern="6:8")


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="no such GGUF file"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(CheckpointError, match=r"m\.gguf cannot be read"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    writer = GGUFWriter(tmp_path / "n.gguf", "nonesuch")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"n\.gguf cannot be read"):
        import_gguf(tmp_path / "n.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_hostile_headers(tmp_path):
    """More of what is here is in tests/fuzz/reader_gguf_import.py."""

    def refused(message, add, *tensors):
        writer = GGUFWriter(tmp_path / "m.gguf", "qwen2")
        add(writer)
        for name in tensors:
            writer.add_tensor(name, np.zeros((2, 2), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(CheckpointError, match=message):
            import_gguf(tmp_path / "m.gguf", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def sizes(writer, layers=1, width=64):
        writer.add_block_count(layers)
        writer.add_embedding_length(width)

    refused("describes 4000000000 layers and has 1 tensors", lambda w: sizes(w, 4 * 10**9), "x")
    refused(r"describes [\d,]{14,} weights", lambda w: sizes(w, 1, 2**20), "x")
    # A list of 2^60 bytes in a file of a few hundred.
    refused("cannot be read", lambda w: w.add_array("list", [1, 2, 3]), "x")
    data = (tmp_path / "m.gguf").read_bytes()
    place = data.index(b"list") + 4 + 4 + 4
    assert data[place : place + 8] == (3).to_bytes(8, "little")
    (tmp_path / "m.gguf").write_bytes(
        data[:place] + (2**60).to_bytes(8, "little") + data[place + 8 :]
    )
    with pytest.raises(CheckpointError, match="is cut off, or its header is longer"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")
