"""The method's own definition, unchanged; and, step by step, what the fused pass computes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sparse_bitnet.core.activation import quantize_activations, quantize_int8
from sparse_bitnet.formats.windows import lift

__all__ = ["quantize_activations", "quantize_fused"]


def quantize_fused(
    x: Tensor,
    norm_weight: Tensor | None = None,
    epsilon: float = 0.0,
    swiglu: bool = False,
    group: int = 0,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """[token factor] → [RMSNorm | SwiGLU product] → int8 → [lifting], step by step."""
    if factor is not None:
        x = (x.float() * factor).to(x.dtype)
    if swiglu:
        gate, up = x.chunk(2, dim=-1)
        x = F.silu(gate) * up
    if norm_weight is not None:
        full = x.float()
        inverse_rms = (full.square().mean(-1, keepdim=True) + epsilon).rsqrt()
        x = (full * inverse_rms).to(x.dtype) * norm_weight
    quantized, scale = quantize_int8(x)
    return (lift(quantized, group) if group else quantized), scale
