"""The pretrained directory that a recipe's ``model.source`` names.

What ``train`` builds of it has finite weights, enough embedding rows, and takes a step.
"""

import torch
import toy

from sparse_bitnet.train.config import ModelConfig, SparsityConfig
from sparse_bitnet.train.model import build_model, convert_model


def build(directory):
    toy.model(None).save_pretrained(directory, max_shard_size="60KB")


def read(directory, mutation):
    source = ModelConfig(source=str(directory))
    model = build_model(source, vocab_size=toy.VOCABULARY, seed=0, device=torch.device("cpu"))
    convert_model(model, SparsityConfig())
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert len(model.get_input_embeddings().weight) >= toy.VOCABULARY
    if "config.json" not in mutation.touched:
        model(toy.TOKENS, labels=toy.TOKENS).loss.backward()
