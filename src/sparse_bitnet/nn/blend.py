"""Gradual quantization: a ternary layer that computes between full precision and integers.

A pretrained model does not survive becoming ternary at once. So λ rises from 0 to 1 over a part of
training, and a layer multiplies with

    x + λ·(Q(x) − x)    and    m·w + λ·(γT − m·w)

where m is the mask of the pattern in force, which is a dial of its own: at λ = 0 a layer computes
what its full-precision baseline does, at λ = 1 the published method. Gradients pass through both
blends as through the quantizations (the dual straight-through estimator). At λ = 1 nothing here
runs: layers multiply integers, as ever.

Source of the blend: "Fine-tuning LLMs to 1.58 bit", Hugging Face, 2024.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_bitnet.core import ConfigError, quantize_activations
from sparse_bitnet.kernels.matmul import unpacked
from sparse_bitnet.nn.derived import DerivedModule


class Blend(torch.autograd.Function):
    """exact + λ·(quantized − exact) forward, the identity to ``exact`` backward."""

    @staticmethod
    def forward(ctx: Any, exact: Tensor, quantized: Tensor, part: Tensor) -> Tensor:
        return torch.lerp(exact, quantized, part.to(exact.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None, None


def blended_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ternary: Tensor,
    w_scale: Tensor,
    bits: int,
    part: Tensor,
) -> Tensor:
    """The product of a layer in between, in plain PyTorch.

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]``, masked, with the gradient that the method asks for.
        bias: ``[out]`` or None.
        ternary: masked, as ``ternary_matmul`` takes it.
        w_scale: γ of each row, ``[out]``.
        bits: of the activations.
        part: λ, a scalar on the device of ``x``.

    Returns:
        ``[..., out]``, in the dtype that ``F.linear`` gives.
    """
    x_q, x_scale = quantize_activations(x, bits)
    x = Blend.apply(x, (x_q * x_scale).to(x.dtype), part)
    ternary = unpacked(ternary, x.shape[-1])
    quantized = (ternary * w_scale.unsqueeze(-1)).to(weight.dtype)
    weight = Blend.apply(weight, quantized, part)
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def set_quantization(
    model: nn.Module, part: float, by_rule: dict[str, float] | None = None
) -> None:
    """Let all ternary modules compute at λ = ``part`` from now on; full-precision ones have none.

    λ lives in a tensor that later calls write to, so neither compiled code nor a CUDA graph is made
    anew for another value, except when λ reaches or leaves 1. Under FSDP2, call it once before
    :func:`sparse_bitnet.nn.shard`: what is sharded at 1 has to stay there.

    Args:
        part: 0 (full precision, masked) to 1 (the published method).
        by_rule: regular expression → λ of the modules in whose name it is found, the first that is
            found; the others have ``part``.

    Raises:
        ConfigError: if a λ is outside of that, or a rule names no ternary module.
    """
    parts = {**(by_rule or {}), "": part}  # the empty expression is found everywhere
    if not all(0 <= one <= 1 for one in parts.values()):
        wrong = next(one for one in parts.values() if not 0 <= one <= 1)
        raise ConfigError(f"set_quantization: {wrong!r} is not between 0 and 1")
    shared: dict[tuple[str, torch.device], Tensor] = {}
    used = {""}
    for name, module in model.named_modules():
        if not (isinstance(module, DerivedModule) and module.is_ternary):
            continue
        rule = next(rule for rule in parts if re.search(rule, name))
        used.add(rule)
        if parts[rule] == 1:
            module.blend = None
            continue
        key = rule, next(iter(module.master_parameters().values())).device
        if key not in shared:
            kept = module.blend
            if kept is None or any(kept is other for other in shared.values()):
                kept = torch.empty((), device=key[1])
            shared[key] = kept.fill_(parts[rule])
        module.blend = shared[key]
    if unused := parts.keys() - used:
        raise ConfigError(
            f"set_quantization: the rule {min(unused)!r} decides for no ternary module: none has "
            "it in its name, or an earlier rule decides"
        )
