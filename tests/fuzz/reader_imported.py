"""A checkpoint of transformers' bitnet format, as `sparse-bitnet import` reads it.

What is imported has finite master weights; with ``config.json`` and weights as they were, it
computes what the clean one did.
"""

import shutil

import torch
import toy

from sparse_bitnet.export.bitnet.read import import_bitnet
from sparse_bitnet.export.bitnet.write import export_bitnet
from sparse_bitnet.train import SparsityConfig, load_trained, save_trained

expected = {}


def build(directory):
    trained = directory.with_name("trained")
    save_trained(toy.model(), toy.tokenizer(), trained, SparsityConfig())
    export_bitnet(trained, directory, linear_class="autobitlinear")


@torch.no_grad()
def read(directory, mutation):
    out = directory.parent / "imported"
    shutil.rmtree(out, ignore_errors=True)
    import_bitnet(directory, out)
    model, _ = load_trained(out)
    for parameter in model.parameters():
        assert parameter.isfinite().all()
    if not mutation.touched & {"config.json", "model.safetensors"}:
        logits = model(toy.TOKENS).logits
        assert torch.equal(expected.setdefault("logits", logits), logits), "computes something else"
