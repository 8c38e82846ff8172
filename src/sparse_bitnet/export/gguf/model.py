"""Architectures as llama.cpp names them: hyper-parameters, tensor names, order of rows.

qwen2 and qwen3 have architectures of their own there; Mistral's dense models are ``llama``, and a
Llama with SubLN is ``bitnet``, which has silu where ``BitNetForCausalLM`` may have others. The
``llama`` graph rotates neighbouring lanes of a head where Hugging Face's rotates halves, so rows of
its query and key projections change places.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparse_bitnet.core import ConfigError

if TYPE_CHECKING:
    from gguf import GGUFWriter

ARCHITECTURES = {
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "llama": "llama",
    "mistral": "llama",
    "bitnet": "bitnet",
}
ATTENTION = ("q_proj", "k_proj", "v_proj")
# Biases that the graph of an architecture adds; it would not load a file with others.
BIASES = {
    "qwen2": ATTENTION,
    "qwen3": ATTENTION,
    "llama": (*ATTENTION, "o_proj", "gate_proj", "up_proj", "down_proj"),
    "bitnet": (),
}
ROPE_FREQS = "rope_freqs.weight"


def architecture(model: PreTrainedModel) -> str:
    """llama.cpp's name for a model's architecture.

    Raises:
        ConfigError: if it has none that computes the same.
    """
    config = model.config
    kind = config.model_type
    if kind not in ARCHITECTURES or not type(model).__name__.endswith("ForCausalLM"):
        raise ConfigError(
            f"gguf: a {type(model).__name__} cannot be exported; the architectures are "
            f"{', '.join(ARCHITECTURES)}. Pack it and run it with sparse-bitnet"
        )
    if config.hidden_act != "silu":
        raise _refuse(model, f"its activation is {config.hidden_act}", "silu")
    if kind == "bitnet" and not config.tie_word_embeddings:
        raise _refuse(model, "its output head is a matrix of its own", "the embedding as head")
    if kind == "qwen2" and head_dim(model) * config.num_attention_heads != config.hidden_size:
        raise _refuse(model, "its heads do not span hidden_size", "heads that do")
    rope = model.config.rope_parameters
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise _refuse(model, f"its rope_type is {rope['rope_type']}", "default, linear or llama3")
    if rope["rope_type"] == "llama3" and ARCHITECTURES[kind] != "llama":
        raise _refuse(model, "its rope_type is llama3", "default or linear")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refuse(model, "it rotates a part of each head", "whole heads")
    return ARCHITECTURES[kind]


def check_bias(model: PreTrainedModel, name: str) -> None:
    """Refuse a bias that llama.cpp's graph of this architecture does not add.

    Raises:
        ConfigError: naming the layer.
    """
    allowed = BIASES[ARCHITECTURES[model.config.model_type]]
    if name.rpartition(".")[2] not in allowed:
        known = f"biases of {', '.join(allowed)} only" if allowed else "no biases"
        raise _refuse(model, f"{name} has a bias", known)


def write_hyperparameters(writer: GGUFWriter, model: PreTrainedModel, lost: list[str]) -> None:
    """Add the keys of the architecture."""
    from gguf import RopeScalingType

    config = model.config
    context = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    if window is not None and window < context:
        lost.append(
            f"llama.cpp attends to all tokens where the model has a window of {window}; the file "
            "gives that as its context length"
        )
        context = window
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(model))
    writer.add_value_length(head_dim(model))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head_dim(model))
    rope = model.config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def rope_factors(model: PreTrainedModel) -> Tensor | None:
    """Llama 3's divisors of the rotary frequencies, float32 ``[head_dim / 2]``, if it has them.

    Wavelengths up to ``original / high`` stay, those from ``original / low`` on are ``factor``
    times as long, and in between it goes smoothly from one to the other.
    """
    rope = model.config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    lanes = torch.arange(0, head_dim(model), 2, dtype=torch.float32) / head_dim(model)
    wavelength = 2 * math.pi * rope["rope_theta"] ** lanes
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] / wavelength
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / rope["factor"] + smooth)


def reorder_rows(model: PreTrainedModel, name: str) -> Tensor | None:
    """Row order of a layer (and its bias) in the file; None for the model's own.

    Rows of one head are ``[2, half]`` here and ``[half, 2]`` there.
    """
    config = model.config
    if ARCHITECTURES[config.model_type] != "llama":
        return None
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    if (count := heads.get(name.rpartition(".")[2])) is None:
        return None
    size = head_dim(model)
    return torch.arange(count * size).view(count, 2, size // 2).transpose(1, 2).flatten()


def head_dim(model: PreTrainedModel) -> int:
    config = model.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _refuse(model: PreTrainedModel, what: str, known: str) -> ConfigError:
    kind = model.config.model_type
    return ConfigError(
        f"gguf: llama.cpp's {ARCHITECTURES[kind]} does not compute this {type(model).__name__}: "
        f"{what}, and it knows {known}. Pack it and run it with sparse-bitnet"
    )
