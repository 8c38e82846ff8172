"""Every verb that reads a model, on an ordinary directory and on a GGUF file of the same values."""

import io
import json

import pytest
import requests

from packed_models import write_trained
from running_server import running
from sparse_bitnet.cli import main
from sparse_bitnet.data.tokenizer import train_bpe
from sparse_bitnet.export.gguf.read import import_gguf
from sparse_bitnet.export.gguf.write import export_gguf

TEXT = "def main():\n    return the name of the file 1234\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """``plain``, a directory, and ``model.gguf``; and a text to measure them on."""
    directory = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 128}
    write_trained(directory / "trained", train_bpe([TEXT] * 30, 320), **sizes)
    export_gguf(directory / "trained", directory / "model.gguf", odd_rows="f16")
    import_gguf(directory / "model.gguf", directory / "plain")
    (directory / "text.txt").write_text(TEXT * 8)
    return directory


@pytest.fixture(params=["plain", "model.gguf"])
def source(request, models):
    return models / request.param


@pytest.fixture
def verb(capsys):
    """What a command prints."""

    def run(*arguments):
        capsys.readouterr()
        main([str(one) for one in arguments])
        return capsys.readouterr().out

    return run


def test_evaluate(models, verb):
    options = ["--text", f"text:{models / 'text.txt'}", "--window", 32, "--device", "cpu", "--json"]
    found = json.loads(verb("evaluate", models / "model.gguf", models / "plain", *options))
    assert found["differences"] == {"text: nats a token": 0.0}


def test_inspect(source, verb):
    assert "Qwen2ForCausalLM, ordinary" in verb("inspect", source)
    found = json.loads(verb("inspect", source, "--json"))
    parameters = found["count"] + found["other_parameters"]
    assert found["file_bytes"] > parameters  # at least a byte each, in either form
    stored = 32 if source.is_dir() else 8 * source.stat().st_size / parameters
    assert found["bits"] == pytest.approx(stored)


def test_generate(source, verb):
    printed = verb("generate", source, "def main", "--max-new-tokens", 4, "--device", "cpu")
    assert printed.startswith("def main") and len(printed) > len("def main\n")


def test_chat(source, verb, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("def main\n"))
    assert verb("chat", source, "--max-new-tokens", 4, "--device", "cpu").strip()


def test_serve(source):
    asked = {"model": source.name, "prompt": "def main", "max_tokens": 4}
    with running(source, device="cpu") as address:
        answer = requests.post(f"{address}/v1/completions", json=asked, timeout=60).json()
    assert answer["usage"]["completion_tokens"] == 4


def test_polarization(source, models, verb, tmp_path):
    verb("polarization", source, "--out", tmp_path)
    found = json.loads((tmp_path / "polarization.json").read_text())
    layers = [layer["name"] for layer in found["layers"]]
    # In the order of the model.
    assert len(layers) == 14 and layers[0] == "model.layers.0.self_attn.q_proj.weight"
    # Ternary weights before the mask's zeros: what the mask took stays zero in the file.
    assert found["overall"]["zeros_before_mask"] > 0.25


def test_estimate(source, verb):
    printed = verb("estimate", source)
    assert "14 modules" in printed and "H200" in printed


def test_files_that_are_no_models(tmp_path, capsys):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(50))
    for arguments in (["inspect", path], ["estimate", path], ["polarization", path]):
        with pytest.raises(SystemExit):
            main([str(one) for one in arguments])
        assert "broken.gguf" in capsys.readouterr().err
