"""The verbs as the command line calls them: through tyro, required arguments by position."""

import json

import pytest

from sparse_bitnet import cli
from sparse_bitnet.core import ConfigError
from sparse_bitnet.train.config import SparsityConfig
from sparse_bitnet.train.export import save_trained


def call(verb, *arguments):
    return cli._call(verb, [str(a) for a in arguments])


def test_pack_inspect_generate_evaluate(tmp_path, trained, tokenizer, capsys):
    model = trained("qwen2")
    save_trained(model, tokenizer, tmp_path / "trained", SparsityConfig(pattern="6:8"))
    packed = tmp_path / "packed"
    result = call("pack", tmp_path / "trained", packed, "--storage", "trits", "--dtype", "bfloat16")
    assert "14 modules with 15,360 weights packed at" in str(result)
    capsys.readouterr()

    text = call("inspect", packed)
    assert "packed, trits" in text
    assert "model.layers.1.mlp.down_proj" in capsys.readouterr().out
    assert json.dumps(call("inspect", packed, "--json")).count('"met": "6:8"') == 14
    assert capsys.readouterr().out == ""

    call("generate", packed, "def main():", "--max-new-tokens", "8", "--temperature", "0.5")
    assert capsys.readouterr().out.startswith("def main():")

    with pytest.raises(ConfigError, match="--max-new-tokens is 0"):
        call("generate", packed, "def main():", "--max-new-tokens", "0")
    assert capsys.readouterr().out == ""

    (tmp_path / "text.txt").write_text("def main():\n    return the name of the file\n" * 8)
    options = ("--text", f"text:{tmp_path / 'text.txt'}", "--window", "32")
    report = call("evaluate", packed, *options)
    assert report.text.tokens > 0
    assert call("evaluate", packed, *options, "--json")["text"]["tokens"] == report.text.tokens
    with pytest.raises(ConfigError, match="nothing to measure"):
        call("evaluate", packed)


def test_evaluate_two(tmp_path, build, trained, tokenizer):
    """A trained model against the ordinary one of a directory, with figures of each alone."""
    save_trained(trained("qwen2"), tokenizer, tmp_path / "trained", SparsityConfig(pattern="6:8"))
    build("qwen2").save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    (tmp_path / "text.txt").write_text("def main():\n    return the name of the file\n" * 8)
    options = ("--text", f"text:{tmp_path / 'text.txt'}", "--window", "32")
    alone = [call("evaluate", tmp_path / n, *options).text.loss for n in ("trained", "plain")]
    both = call("evaluate", tmp_path / "trained", tmp_path / "plain", *options)
    assert [report.text.loss for report in both.reports.values()] == alone
    assert both.differences == {"text: nats a token": pytest.approx(alone[0] - alone[1])}
    assert f"text: nats a token {alone[0] - alone[1]:+.4f}" in str(both)
    values = call("evaluate", tmp_path / "trained", tmp_path / "plain", *options, "--json")
    assert json.loads(json.dumps(values))["differences"] == both.differences


def test_two_models_are_measured_in_windows_of_one_length(tmp_path, build, tokenizer):
    """A model with fewer positions would have shorter ones of its own."""
    for name, positions in (("short", 16), ("long", 64)):
        model = build("qwen2")
        model.config.max_position_embeddings = positions
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "text.txt").write_text("def main():\n    return the name of the file\n" * 8)
    text = ("--text", f"text:{tmp_path / 'text.txt'}")
    alone = call("evaluate", tmp_path / "long", *text, "--window", "16").text.loss
    for order in (("short", "long"), ("long", "short")):
        both = call("evaluate", *(tmp_path / name for name in order), *text)
        assert both.reports[str(tmp_path / "long")].text.loss == alone
    with pytest.raises(ConfigError, match="--window 64 is out of range: the model reads 1 to 16"):
        call("evaluate", tmp_path / "long", tmp_path / "short", *text, "--window", "64")


def test_help_names_the_choices(capsys):
    for verb in ("pack", "inspect", "generate", "evaluate"):
        with pytest.raises(SystemExit):
            call(verb, "--help")
    assert "{two-bit,trits}" in capsys.readouterr().out
