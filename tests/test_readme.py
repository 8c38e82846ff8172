"""What the README tells people to type works: its Python, and its command lines word for word."""

import io
import json
import lzma
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from sparse_bitnet import cli
from sparse_bitnet.data import prepare
from sparse_bitnet.train.presets import preset_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(heading):
    """The first fenced block under a heading."""
    section = README.split(f"\n## {heading}\n")[1]
    return re.search(r"```\w*\n(.*?)```", section, re.S)[1]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A working directory with a text, and the README's recipes made small."""
    desk = tmp_path_factory.mktemp("desk")
    text = [{"text": f"def f{i}(x):\n    return x * {i} + {i % 7}\n" * 20} for i in range(300)]
    with lzma.open(desk / "text.jsonl.xz", "wt") as file:
        file.writelines(json.dumps(line) + "\n" for line in text)
    (desk / "recipes" / "sweeps").mkdir(parents=True)
    recipe = (ROOT / "recipes" / "tiny.yaml").read_text()
    recipe = recipe.replace("data/stdlib", "data/text").replace("steps: 100", "steps: 4")
    for name in ("demo.yaml", "qwen2.5-0.5b.yaml"):
        (desk / "recipes" / name).write_text(recipe)
    toy = (ROOT / "recipes" / "sweeps" / "toy.yaml").read_text().replace("data/stdlib", "data/text")
    toy = toy.replace("tokens_per_weight: 2", "tokens_per_weight: 0.05")
    (desk / "recipes" / "sweeps" / "toy.yaml").write_text(
        toy.replace("[dense, 4:8, 2:8]", "[dense, 4:8]").split("  - name: more")[0]
    )
    return desk


def test_the_python_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("def f(x):\n    return x + 1\n" * 400)
    prepare("text:text", "data", vocab_size=300, validation=0)
    PreTrainedTokenizerFast.from_pretrained("data/tokenizer").save_pretrained("my-model")
    Qwen2ForCausalLM(preset_config("tiny", 300)).save_pretrained("my-model")
    batches = [torch.randint(0, 300, (2, 16)) for _ in range(2)]
    exec(compile(block("Ten lines"), "README.md", "exec"), {"batches": batches})
    assert (tmp_path / "packed" / "config.json").is_file()


def test_the_command_lines(desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    lines = block("The command line").strip().splitlines()
    verbs = {" ".join(verb.split()) for verb in cli.VERBS}
    named = {v for v in verbs if any(line.startswith(f"sparse-bitnet {v}") for line in lines)}
    assert named == verbs - {"demo"}, "every verb has its line"
    served = []
    monkeypatch.setattr("uvicorn.Server.run", lambda server: served.append(server.config.port))
    monkeypatch.setattr("sys.stdin", io.StringIO("def f1\n"))  # a line, then Ctrl-D
    for line in lines:
        words = shlex.split(line)
        if words[0] == "torchrun":
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            words = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
            subprocess.run(words, check=True, env=environment, timeout=240, capture_output=True)
        else:
            cli.main(words[1:])
    shown = capsys.readouterr().out
    assert "perplexity" in shown and "bits a weight" in shown
    assert (desk / "runs" / "toy" / "report.html").is_file()
    assert served == [8000]
    assert (desk / "model.gguf").is_file() and (desk / "imported" / "config.json").is_file()


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_it_links_to_exist(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M)
            assert anchor in {h.lower().replace(" ", "-") for h in headings}, link
