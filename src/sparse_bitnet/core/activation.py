"""Activation quantization: integers with one scale a token: X ≈ scale · Xq."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bitnet.core.errors import ConfigError

SMALLEST_MAGNITUDE = 1e-5


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Absmax quantization: s = 127 / max(|x|, 1e-5), Xq = clip(round(x·s), −127, 127).

    Args:
        x: ``[..., in]``, any float dtype; computed in float32.

    Returns:
        ``(quantized, scale)``: int8 ``[..., in]``, never −128, and float32 ``[..., 1]``, the
        size of one integer step (1/s), so that ``x ≈ quantized * scale``.

    Source: section 2 of arXiv 2402.17764, whose lower limit of −128 no value reaches. A token of
    zeros gives zeros.
    """
    x = x.detach().float()
    magnitude = x.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST_MAGNITUDE)
    # Eagerly the clip has nothing to do. Compiled, backward may make x again from rounded values,
    # larger than this magnitude, and scalar and GPU code convert 128 to the int8 −128.
    quantized = (x * (127.0 / magnitude)).round_().clamp_(-127, 127).to(torch.int8)
    return quantized, magnitude / 127.0


def quantize_int4(x: Tensor) -> tuple[Tensor, Tensor]:
    """Absmean quantization to four bits: s = √7 / mean(|x|), Xq = clip(round(x·s), −8, 7).

    Shapes as :func:`quantize_int8`; the values lie in [−8, 7] and are kept in int8. The mean is
    summed in float64: it neither overflows nor depends on the order of summation.

    Source: the 4-bit variant of the published code (BitNet a4.8, arXiv 2411.04965).
    """
    x = x.detach().float()
    magnitude = x.abs().mean(dim=-1, keepdim=True, dtype=torch.float64).float()
    magnitude = magnitude.clamp(min=SMALLEST_MAGNITUDE)
    quantized = (x * (7.0**0.5 / magnitude)).round_().clamp_(-8, 7).to(torch.int8)
    return quantized, magnitude / 7.0**0.5


def quantize_activations(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """:func:`quantize_int8` or :func:`quantize_int4`.

    Raises:
        ConfigError: for another number of bits.
    """
    if bits not in (8, 4):
        raise ConfigError(f"quantize_activations: bits is {bits!r}; choose 8 or 4")
    return quantize_int8(x) if bits == 8 else quantize_int4(x)
