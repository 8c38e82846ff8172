"""SubLN: an RMSNorm before the last product of attention and of the MLP.

Ternary layers want inputs of even size, and the inputs of ``o_proj`` and ``down_proj`` have none.
transformers' ``BitNetForCausalLM`` is a Llama with these two norms (and any activation), so a model
that gets them needs no architecture of ours, and llama.cpp's ``bitnet`` computes it too.

Source: BitDistill, arXiv 2510.13998.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparse_bitnet.core import ConfigError

if TYPE_CHECKING:  # transformers imports this package before it has these
    from transformers import BitNetForCausalLM, PreTrainedModel

FAMILY = ("llama", "mistral")
NORMED = {"self_attn.o_proj": "self_attn.attn_sub_norm", "mlp.down_proj": "mlp.ffn_sub_norm"}


def add_sub_norms(model: PreTrainedModel, tokens: Tensor) -> BitNetForCausalLM:
    """The model with SubLN, before it is converted.

    A norm divides each token by its own size; its weight starts as what best undoes that on some
    tokens, so that the model begins near where it was.

    Args:
        model: a Llama, or another that computes like one; its parameters are taken over.
        tokens: ``[sequences, length]`` token ids of ordinary text.

    Raises:
        ConfigError: for other architectures, or parts of one that ``BitNetForCausalLM`` has not.
    """
    from transformers import AutoModelForCausalLM, BitNetConfig

    config = model.config
    if config.model_type == "bitnet":
        raise ConfigError("sub_norms: the model has them already; leave model.sub_norms out")
    heads = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for refused, why in (
        (config.model_type not in FAMILY, f"is a {config.model_type}"),
        (getattr(config, "mlp_bias", False), "has biases in its MLP"),
        (getattr(config, "sliding_window", None) is not None, "has a sliding window"),
        (heads * config.num_attention_heads != config.hidden_size, "has heads of another width"),
    ):
        if refused:
            raise ConfigError(
                f"sub_norms: the model {why}, which transformers' BitNetForCausalLM does not "
                f"compute; those of {' and '.join(FAMILY)} without such parts can have them"
            )
    names = BitNetConfig().to_dict().keys() - {"model_type", "architectures"}
    values = {name: value for name, value in config.to_dict().items() if name in names}
    new_config = BitNetConfig(**values)
    weights = _weights(model, tokens)
    with torch.device("meta"):
        new: BitNetForCausalLM = AutoModelForCausalLM.from_config(
            new_config, attn_implementation=config._attn_implementation
        )
    new.load_state_dict(model.state_dict() | weights, assign=True)
    new.tie_weights()
    # Buffers that no state dict holds.
    new.model.rotary_emb = type(new.model.rotary_emb)(new_config).to(tokens.device)
    new.generation_config = model.generation_config
    return new.train(model.training)


@torch.no_grad()
def _weights(model: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    """The new norms' weights: by least squares, what gives the old values of ``tokens`` back."""
    found: dict[str, Tensor] = {}

    def fit(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor]) -> None:
            x = args[0].float().flatten(0, -2)
            normed = x * x.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()
            found[name] = (x * normed).sum(0) / normed.square().sum(0).clamp(min=1e-12)

        return hook

    training = model.training
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            for linear, norm in NORMED.items():
                if name.endswith(linear):
                    to = f"{name.removesuffix(linear)}{norm}.weight"
                    hooks.callback(module.register_forward_pre_hook(fit(to)).remove)
        model.eval().base_model(input_ids=tokens, use_cache=False)
    model.train(training)
    return found
