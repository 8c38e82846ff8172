"""A trained directory as the input of the GGUF export, with the tokenizer that goes into the file.

What is written can be read by the format's own reader, and has every matrix of the model.
"""

import toy
from gguf import GGUFReader

from sparse_bitnet.export.gguf.write import export_gguf
from sparse_bitnet.train.config import SparsityConfig
from sparse_bitnet.train.export import save_trained

TENSORS = 27  # 12 a layer with its biases, embedding, final norm, and the head


def build(directory):
    model = toy.model(config=toy.gguf_config(layers=2, tie_word_embeddings=False))
    save_trained(model, toy.tokenizer(), directory, SparsityConfig())


def read(directory, mutation):
    out = directory.parent / "model.gguf"
    export_gguf(directory, out, overwrite=True)
    tensors = GGUFReader(out).tensors
    if not mutation.touched & {"config.json", "model.safetensors"}:
        assert len(tensors) == TENSORS, [tensor.name for tensor in tensors]
