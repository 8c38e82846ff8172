"""Models of any architecture, small enough to train and compile in a test."""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from sparse_bitnet.train.presets import preset_config

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
OWN_SIZES = {
    "qwen2_moe": {
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "gemma2": {"num_attention_heads": 2, "head_dim": 16},
    "mistral": {"sliding_window": None},
}


def tiny_config(architecture="qwen2", **changes):
    sizes = SIZES | OWN_SIZES.get(architecture, {}) | changes
    return AutoConfig.for_model(architecture, **sizes)


def tiny(architecture="qwen2", **changes):
    """The same random model every time, in training mode."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, **changes))
    return model


def randomize_vectors(model):
    """Biases of zero and norms of one would hide a mistake."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)


def preset_model(seed, vocabulary=64, **changes):
    """Of the preset ``tiny``, a Qwen2, with other settings."""
    torch.manual_seed(seed)
    config = preset_config("tiny", vocabulary)
    config.update(changes)
    model = AutoModelForCausalLM.from_config(config)
    return model


class Experts(nn.Module):
    """The parameters of transformers' experts, and no forward: it must not be needed."""

    def __init__(self, experts=4, hidden=16, inner=8):
        super().__init__()
        torch.manual_seed(0)
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, inner))
        self.act_fn = nn.SiLU()
