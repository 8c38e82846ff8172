"""The pretrained directory that a recipe's ``model.source`` names.

What ``train`` builds of it has finite weights, enough embedding rows, and takes a step.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from sparse_bitnet.train.config import ModelConfig, SparsityConfig
from sparse_bitnet.train.model import build_model, convert_model
from sparse_bitnet.train.presets import preset_config

TOKENS = torch.arange(20).view(2, 10)


def build(directory: Path) -> None:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(preset_config("tiny", 300))
    model.save_pretrained(directory, max_shard_size="60KB")


def read(directory: Path, mutation: Any) -> None:
    source = ModelConfig(source=str(directory))
    model: Any = build_model(source, vocab_size=300, seed=0, device=torch.device("cpu"))
    convert_model(model, SparsityConfig())
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert len(model.get_input_embeddings().weight) >= 300
    if "config.json" not in mutation.touched:
        model(TOKENS, labels=TOKENS).loss.backward()
