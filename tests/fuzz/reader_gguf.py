"""A trained directory as the input of the GGUF export, with the tokenizer that goes into the file.

What is written can be read by the format's own reader, and has every matrix of the model.
"""

from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, Qwen2Config

from sparse_bitnet.data.tokenizer import train_bpe
from sparse_bitnet.export.gguf.write import export_gguf
from sparse_bitnet.nn import convert
from sparse_bitnet.train.config import SparsityConfig
from sparse_bitnet.train.export import save_trained

TENSORS = 27  # 12 a layer with its biases, embedding, final norm, and the head


def build(directory: Path) -> None:
    torch.manual_seed(0)
    tokenizer = train_bpe(["some text to learn from, and then some more of it"], 300)
    shape = Qwen2Config(
        vocab_size=300,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(shape)
    convert(model, "6:8")
    save_trained(model, tokenizer, directory, SparsityConfig())


def read(directory: Path, mutation: Any) -> None:
    out = directory.parent / "model.gguf"
    export_gguf(directory, out)
    tensors = GGUFReader(out).tensors
    if not mutation.touched & {"config.json", "model.safetensors"}:
        assert len(tensors) == TENSORS, [tensor.name for tensor in tensors]
