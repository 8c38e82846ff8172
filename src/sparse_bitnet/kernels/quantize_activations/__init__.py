"""Activations → integers with one scale a token, and what can ride in the same pass."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bitnet.kernels.library import register
from sparse_bitnet.kernels.platform import runs_triton
from sparse_bitnet.kernels.quantize_activations import reference

__all__ = ["add_norm_quantize", "quantize_activations", "quantize_fused"]


def quantize_activations(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Per-token integers and their step; see ``core.quantize_activations``.

    One Triton pass on CUDA for 8 bits; the reference elsewhere. Both give the same values.
    """
    if bits == 8 and runs_triton(x):
        return quantize_fused(x)
    return reference.quantize_activations(x, bits)


def quantize_fused(
    x: Tensor,
    norm_weight: Tensor | None = None,
    epsilon: float = 0.0,
    swiglu: bool = False,
) -> tuple[Tensor, Tensor]:
    """[RMSNorm | SwiGLU product] → int8 and token scale, in one pass.

    Args:
        x: ``[..., in]``, float; ``[..., 2·in]``, gate before up, with ``swiglu``.
        norm_weight: ``[in]``; RMSNorm comes first if given.
        epsilon: of the RMSNorm.
        swiglu: quantize silu(gate)·up.

    Returns:
        int8 ``[..., in]`` and float32 ``[..., 1]``. Intermediate values are rounded to ``x.dtype``
        where the separate modules round.
    """
    x = x.detach()
    if not runs_triton(x):
        return reference.quantize_fused(x, norm_weight, epsilon, swiglu)
    quantized, scale = torch.ops.sparse_bitnet.quantize_activations(x, norm_weight, epsilon, swiglu)
    return quantized, scale


def add_norm_quantize(
    x: Tensor, delta: Tensor, norm_weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """A decoder's step between two sublayers: residual sum, RMSNorm, quantization, in one pass.

    Args:
        x: ``[..., in]``, float: the residual stream.
        delta: like ``x``: what a sublayer adds to it.
        norm_weight: ``[in]``.
        epsilon: of the RMSNorm.

    Returns:
        x + delta, then int8 ``[..., in]`` and float32 ``[..., 1]`` of its norm.
    """
    if not runs_triton(x):
        total = x + delta
        return total, *reference.quantize_fused(total, norm_weight, epsilon)
    total, quantized, scale = torch.ops.sparse_bitnet.add_norm_quantize(
        x, delta, norm_weight, epsilon
    )
    return total, quantized, scale


def _cuda(
    x: Tensor, norm_weight: Tensor | None, epsilon: float, swiglu: bool
) -> tuple[Tensor, Tensor]:
    from sparse_bitnet.kernels.quantize_activations import triton

    return triton.quantize(x, norm_weight, epsilon, swiglu)


def _fake(
    x: Tensor, norm_weight: Tensor | None, epsilon: float, swiglu: bool
) -> tuple[Tensor, Tensor]:
    columns = x.shape[-1] // 2 if swiglu else x.shape[-1]
    return (
        x.new_empty((*x.shape[:-1], columns), dtype=torch.int8),
        x.new_empty((*x.shape[:-1], 1), dtype=torch.float32),
    )


def _cuda_add_norm(
    x: Tensor, delta: Tensor, norm_weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    from sparse_bitnet.kernels.quantize_activations import triton

    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    quantized, scale = triton.quantize(
        x, norm_weight, epsilon, delta=delta.contiguous(), total=total
    )
    return total, quantized, scale


def _fake_add_norm(
    x: Tensor, delta: Tensor, norm_weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), *_fake(x, norm_weight, epsilon, False)


register(
    "add_norm_quantize(Tensor x, Tensor delta, Tensor norm_weight, float epsilon) "
    "-> (Tensor, Tensor, Tensor)",
    _cuda_add_norm,
    _fake_add_norm,
)
register(
    "quantize_activations(Tensor x, Tensor? norm_weight, float epsilon, bool swiglu) "
    "-> (Tensor, Tensor)",
    _cuda,
    _fake,
)
