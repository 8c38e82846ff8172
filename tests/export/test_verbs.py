"""The verbs as the command line calls them."""

import pytest

from packed_models import write_trained
from sparse_bitnet import files
from sparse_bitnet.cli import main
from sparse_bitnet.core import ConfigError
from sparse_bitnet.data.tokenizer import train_bpe
from sparse_bitnet.export.verbs import export

TEXT = "def main():\n    return the name of the file\n"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    sizes = {"hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 1}
    out = tmp_path_factory.mktemp("model") / "trained"
    return write_trained(out, train_bpe([TEXT] * 20, 300), **sizes)


def run(*arguments):
    main([str(argument) for argument in arguments])


def test_gguf(directory, tmp_path, capsys):
    out = tmp_path / "m.gguf"
    with pytest.raises(SystemExit, match="2"):
        run("export", directory, out)
    assert "--odd-rows f16" in capsys.readouterr().err
    run("export", directory, out, "--odd-rows", "f16", "--linears", "tq1_0")
    text = capsys.readouterr().out
    assert f"{out}: GGUF TQ1_0, 442,368 ternary weights" in text
    assert "each γ is rounded to fp16" in text and "NFC" in text
    run("export", directory, tmp_path / "other", "--to", "gguf", "--odd-rows", "f16")
    assert (tmp_path / "other").is_file()


def test_bitnet_and_back(directory, tmp_path, capsys):
    run("export", directory, tmp_path / "hf", "--to", "bitnet", "--linear-class", "autobitlinear")
    assert "bitnet (autobitlinear)" in capsys.readouterr().out
    run("import", tmp_path / "hf", tmp_path / "back", "--pattern", "2:4")
    shown = capsys.readouterr().out
    assert "Qwen2ForCausalLM from bitnet (autobitlinear, offline), 7 layers" in shown
    run("inspect", tmp_path / "back", "--json")
    assert capsys.readouterr().out.count('"met": "2:4"') == 7


@pytest.mark.parametrize(
    "options", [["export", "--odd-rows", "f16"], ["pack"], ["export"], ["import"]]
)
def test_an_output_that_appears_meanwhile(options, directory, tmp_path, monkeypatch, capsys):
    """Is an error, and stays as it is, wherever in the work it appears."""
    out = tmp_path / ("out.gguf" if "--odd-rows" in options else "out")
    if options == ["import"]:
        run("export", directory, tmp_path / "hf", "--to", "bitnet")
        directory = tmp_path / "hf"
    elif options == ["export"]:
        options = ["export", "--to", "bitnet"]
    sync = files._sync

    def appear(path):
        out.write_text("of another")
        sync(path)

    monkeypatch.setattr(files, "_sync", appear)
    with pytest.raises(SystemExit, match="2"):
        run(options[0], directory, out, *options[1:])
    assert f"{out} exists and is not a" in capsys.readouterr().err
    assert out.read_text() == "of another"
    assert {path.name for path in tmp_path.iterdir()} <= {out.name, "hf"}


def test_options_of_the_other_format(directory, tmp_path):
    with pytest.raises(ConfigError, match="--to gguf or --to bitnet"):
        export(directory, tmp_path / "out")
    with pytest.raises(ConfigError, match="--linear-class is no option of --to gguf"):
        export(directory, tmp_path / "m.gguf", linear_class="bitlinear")
    with pytest.raises(ConfigError, match="--odd-rows is no option of --to bitnet"):
        export(directory, tmp_path / "m", to="bitnet", odd_rows="f16")
