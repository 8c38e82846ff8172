"""A checkpoint of transformers' bitnet format, as `sparse-bitnet import` reads it.

What is imported has finite master weights; with ``config.json`` and weights as they were, it
computes what the clean one did.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from sparse_bitnet.data.tokenizer import train_bpe
from sparse_bitnet.export.bitnet.read import import_bitnet
from sparse_bitnet.export.bitnet.write import export_bitnet
from sparse_bitnet.nn import convert
from sparse_bitnet.train import SparsityConfig, load_trained, save_trained
from sparse_bitnet.train.presets import preset_config

TOKENS = torch.arange(20).view(2, 10)
expected: dict[str, torch.Tensor] = {}


def build(directory: Path) -> None:
    torch.manual_seed(0)
    tokenizer = train_bpe(["some text to learn from, and then some more of it"], 300)
    model = AutoModelForCausalLM.from_config(preset_config("tiny", 300))
    convert(model, "6:8")
    trained = directory.with_name("trained")
    save_trained(model, tokenizer, trained, SparsityConfig())
    export_bitnet(trained, directory, linear_class="autobitlinear")


@torch.no_grad()
def read(directory: Path, mutation: Any) -> None:
    out = directory.parent / "imported"
    shutil.rmtree(out, ignore_errors=True)
    import_bitnet(directory, out)
    model, _ = load_trained(out)
    for parameter in model.parameters():
        assert parameter.isfinite().all()
    if not mutation.touched & {"config.json", "model.safetensors"}:
        logits = model(TOKENS).logits
        assert torch.equal(expected.setdefault("logits", logits), logits), "computes something else"
