"""A GGUF file as `sparse-bitnet import` reads it: a model and its tokenizer.

What is imported has finite weights; those of the clean file, if the damaged one was not touched.
"""

import shutil

import torch
import toy

from sparse_bitnet.export.gguf.read import import_gguf
from sparse_bitnet.export.gguf.write import export_gguf
from sparse_bitnet.train import SparsityConfig, save_trained
from sparse_bitnet.train.dense import read_dense

NAMED = True
FILE = "model.gguf"
expected = {}


def build(directory):
    model = toy.model(config=toy.gguf_config(layers=1))
    trained = directory.with_name("trained")
    save_trained(model, toy.tokenizer(), trained, SparsityConfig())
    export_gguf(trained, directory / FILE)


@torch.no_grad()
def read(directory, mutation):
    out = directory.parent / "imported"
    shutil.rmtree(out, ignore_errors=True)
    import_gguf(directory / FILE, out)
    model = read_dense(out, exact=True)
    for parameter in model.parameters():
        assert parameter.isfinite().all()
    if FILE not in mutation.touched:
        logits = model(toy.TOKENS).logits
        assert torch.equal(expected.setdefault("logits", logits), logits), "computes something else"
