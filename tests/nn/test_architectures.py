"""Every causal language model of transformers that a few small numbers shrink: none computes with a
master weight outside of the converted module without being refused."""

import contextlib

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sparse_bitnet.core import ConfigError, PatternError
from sparse_bitnet.nn import convert, frozen, master_weights

# A small number, and the names that architectures have for what it is in them.
NAMES = {
    32: "hidden_size d_model n_embd embed_dim embedding_size word_embed_proj_dim lru_width",
    48: "intermediate_size ffn_dim n_inner ffn_hidden_size",
    16: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
    "q_lora_rank kv_lora_rank sliding_window",
    2: "num_hidden_layers n_layer n_layers num_layers num_key_value_heads num_experts_per_tok "
    "mamba_expand eos_token_id",
    4: "num_attention_heads n_head n_heads num_heads num_experts num_local_experts "
    "n_routed_experts moe_num_experts",
    8: "head_dim rotary_dim qk_rope_head_dim qk_nope_head_dim v_head_dim state_size mamba_d_state "
    "mamba_n_heads mamba_num_heads mamba_d_head mamba_head_dim time_step_rank mamba_dt_rank",
    1: "n_group topk_group n_groups mamba_n_groups bos_token_id",
    64: "vocab_size max_position_embeddings n_positions",
    0: "pad_token_id",
}
SMALL = {name: number for number, names in NAMES.items() for name in names.split()}
LARGEST = 5_000_000  # parameters; what stays larger has sizes of other names


def shrunk(kind):
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


def reads_outside(model):
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
def test_no_master_weight_is_read_outside(kind):
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
