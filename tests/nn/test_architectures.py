"""Every causal language model of transformers that a few small numbers shrink: none computes with a
master weight outside of the converted module without being refused."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sparse_bitnet.core import ConfigError, PatternError
from sparse_bitnet.nn import convert, frozen, master_weights

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "embed_dim": 32,
    "embedding_size": 32,
    "word_embed_proj_dim": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "ffn_dim": 48,
    "n_inner": 48,
    "ffn_hidden_size": 48,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_num_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "sliding_window": 16,
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 8,
    "mamba_head_dim": 8,
    "mamba_expand": 2,
    "n_groups": 1,
    "mamba_n_groups": 1,
    "time_step_rank": 8,
    "mamba_dt_rank": 8,
    "lru_width": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LARGEST = 5_000_000  # parameters; what stays larger has sizes of other names


def shrunk(kind: str) -> Any:
    """A small random model, or None if its configuration needs other numbers."""
    try:
        known = CONFIG_MAPPING[kind]().to_dict()
        config = CONFIG_MAPPING[kind](**{k: v for k, v in SMALL.items() if k in known})
        with torch.device("meta"):
            shape = AutoModelForCausalLM.from_config(config)
        if sum(p.numel() for p in shape.parameters()) > LARGEST:
            return None
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        model(**model.dummy_inputs, use_cache=False)
    except Exception:  # each architecture has its own ways to refuse sizes
        return None
    return model


def reads_outside(model: Any) -> bool:
    """True if poisoned master weights reach the logits though modules keep what they derived."""
    before = [weight.weight.detach().clone() for weight in master_weights(model)]
    with torch.no_grad(), frozen(model):
        for weight in master_weights(model):
            weight.weight.fill_(torch.nan)
        try:
            logits = model(**model.dummy_inputs, use_cache=False).logits
        finally:
            for weight, values in zip(master_weights(model), before, strict=True):
                weight.weight.copy_(values)
    return not bool(logits.isfinite().all())


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_no_master_weight_is_read_outside(kind: str) -> None:
    model = shrunk(kind)
    if model is None:
        pytest.skip("not shrunk by these numbers")
    with contextlib.suppress(PatternError):
        try:
            convert(model, "dense")
        except ConfigError as error:
            text = str(error)
            assert "reads the weight without calling" in text or "no nn.Linear" in text, text
            return
        assert not reads_outside(model)
