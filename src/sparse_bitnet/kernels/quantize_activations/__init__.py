"""Activations → integers with one scale a token, and what can ride in the same pass."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bitnet.formats.windows import lift
from sparse_bitnet.kernels.library import register
from sparse_bitnet.kernels.platform import runs_triton
from sparse_bitnet.kernels.quantize_activations import reference

__all__ = [
    "add_norm_quantize",
    "quantize_activations",
    "quantize_fused",
    "quantize_with_lifted",
]


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
    group: int = 0,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """[token factor] → [RMSNorm | SwiGLU product] → int8 and token scale → [lifting], in one pass.

    Args:
        x: ``[..., in]``, float; ``[..., 2·in]``, gate before up, with ``swiglu``.
        norm_weight: ``[in]``; RMSNorm comes first if given.
        epsilon: of the RMSNorm.
        swiglu: quantize silu(gate)·up.
        factor: float32 ``[..., 1]``, multiplied in first: the token scale of a product without one.
        group: lift for windows of groups of this many lanes, (2L−2):2L; 0 for none.

    Returns:
        int8 ``[..., in]`` (``[..., in·(2·group − 4)/group]`` when lifted) and float32 ``[..., 1]``.
        Intermediate values are rounded to ``x.dtype`` where the separate modules round.
    """
    x = x.detach()
    if not runs_triton(x):
        return reference.quantize_fused(x, norm_weight, epsilon, swiglu, group, factor)
    quantized, scale = torch.ops.sparse_bitnet.quantize_activations(
        x, norm_weight, epsilon, swiglu, group, factor
    )
    return quantized, scale


def quantize_with_lifted(x: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a training step wants of a layer over windows: one pass, both forms.

    Args:
        x: ``[..., in]``, float.
        group: lanes of a window group, (2L−2):2L; it divides ``in``.

    Returns:
        int8 ``[..., in]`` for backward, int8 ``[..., in·(2·group − 4)/group]`` lifted for the
        product, float32 ``[..., 1]``.
    """
    x = x.detach()
    if not runs_triton(x):
        quantized, scale = reference.quantize_fused(x)
        return quantized, lift(quantized, group), scale
    quantized, lifted, scale = torch.ops.sparse_bitnet.quantize_with_lifted(x, group)
    return quantized, lifted, scale


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


def _width(x: Tensor, swiglu: bool, group: int) -> int:
    columns = x.shape[-1] // 2 if swiglu else x.shape[-1]
    return columns // group * (2 * group - 4) if group else columns


def _cuda(
    x: Tensor,
    norm_weight: Tensor | None,
    epsilon: float,
    swiglu: bool,
    group: int,
    factor: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from sparse_bitnet.kernels.quantize_activations import triton

    return triton.quantize(x, norm_weight, epsilon, swiglu, group, factor)


def _fake(
    x: Tensor,
    norm_weight: Tensor | None,
    epsilon: float,
    swiglu: bool,
    group: int,
    factor: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty((*x.shape[:-1], _width(x, swiglu, group)), dtype=torch.int8),
        x.new_empty((*x.shape[:-1], 1), dtype=torch.float32),
    )


def _cuda_with_lifted(x: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    from sparse_bitnet.kernels.quantize_activations import triton

    plain = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    lifted, scale = triton.quantize(x, group=group, plain=plain)
    return plain, lifted, scale


def _fake_with_lifted(x: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    lifted, scale = _fake(x, None, 0.0, False, group, None)
    return x.new_empty(x.shape, dtype=torch.int8), lifted, scale


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
    return x.new_empty(x.shape), *_fake(x, norm_weight, epsilon, False, 0, None)


register(
    "add_norm_quantize(Tensor x, Tensor delta, Tensor norm_weight, float epsilon) "
    "-> (Tensor, Tensor, Tensor)",
    _cuda_add_norm,
    _fake_add_norm,
)
register(
    "quantize_with_lifted(Tensor x, int group) -> (Tensor, Tensor, Tensor)",
    _cuda_with_lifted,
    _fake_with_lifted,
)
register(
    "quantize_activations(Tensor x, Tensor? norm_weight, float epsilon, bool swiglu, int group, "
    "Tensor? factor) -> (Tensor, Tensor)",
    _cuda,
    _fake,
)
