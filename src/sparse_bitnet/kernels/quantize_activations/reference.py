"""The method's own definition, unchanged; and, step by step, what the fused pass computes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sparse_bitnet.core.activation import quantize_activations, quantize_int8

__all__ = ["quantize_activations", "quantize_fused"]


def quantize_fused(
    x: Tensor,
    norm_weight: Tensor | None = None,
    epsilon: float = 0.0,
    swiglu: bool = False,
) -> tuple[Tensor, Tensor]:
    """[RMSNorm | SwiGLU product] → int8, step by step."""
    if swiglu:
        gate, up = x.chunk(2, dim=-1)
        x = F.silu(gate) * up
    if norm_weight is not None:
        full = x.float()
        inverse_rms = (full.square().mean(-1, keepdim=True) + epsilon).rsqrt()
        x = (full * inverse_rms).to(x.dtype) * norm_weight
    return quantize_int8(x)
