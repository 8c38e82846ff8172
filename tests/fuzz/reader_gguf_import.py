"""A GGUF file as `sparse-bitnet import` reads it: a model and its tokenizer.

What is imported has finite weights; those of the clean file, if the damaged one was not touched.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from sparse_bitnet.data.tokenizer import train_bpe
from sparse_bitnet.export.gguf.read import import_gguf
from sparse_bitnet.export.gguf.write import export_gguf
from sparse_bitnet.nn import convert
from sparse_bitnet.train import SparsityConfig, save_trained
from sparse_bitnet.train.dense import read_dense

NAMED = True
FILE = "model.gguf"
TOKENS = torch.arange(20).view(2, 10)
expected: dict[str, torch.Tensor] = {}


def build(directory: Path) -> None:
    torch.manual_seed(0)
    tokenizer = train_bpe(["some text to learn from, and then some more of it"], 300)
    shape = Qwen2Config(
        vocab_size=300,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = AutoModelForCausalLM.from_config(shape)
    convert(model, "6:8")
    trained = directory.with_name("trained")
    save_trained(model, tokenizer, trained, SparsityConfig())
    export_gguf(trained, directory / FILE)


@torch.no_grad()
def read(directory: Path, mutation: Any) -> None:
    out = directory.parent / "imported"
    shutil.rmtree(out, ignore_errors=True)
    import_gguf(directory / FILE, out)
    model = read_dense(out, exact=True)
    for parameter in model.parameters():
        assert parameter.isfinite().all()
    if FILE not in mutation.touched:
        logits = model(TOKENS).logits
        assert torch.equal(expected.setdefault("logits", logits), logits), "computes something else"
