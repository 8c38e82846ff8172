"""Four rows in a byte: how transformers stores ``quant_method: bitnet``, 2 bits a weight.

A weight w is the code w + 1 (0, 1 or 2; 3 is not used). With R rows of bytes, byte r of a column
holds the weights of rows r, R + r, 2R + r and 3R + r, the first in the low bits:

    bit            7 6        5 4       3 2      1 0
    byte r │ w[3R + r] │ w[2R + r] │ w[R + r] │ w[r]

So a layer's output rows have to be a multiple of four.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bitnet.core import ConfigError
from sparse_bitnet.formats.rows import check_bytes, check_ternary
from sparse_bitnet.formats.two_bit import LOW_BITS, PER_BYTE, SHIFTS


def pack(ternary: Tensor, where: str = "weight") -> Tensor:
    """int8 ``[out, in]`` with values in {−1, 0, 1} → uint8 ``[out / 4, in]``.

    Raises:
        WeightError: if the tensor is not int8 or holds another value.
        ConfigError: if four does not divide ``out``.
    """
    check_ternary(ternary, where)
    if ternary.shape[0] % PER_BYTE:
        raise ConfigError(
            f"{where}: {ternary.shape[0]} rows are not a multiple of 4, which this format needs"
        )
    quarters = (ternary + 1).view(torch.uint8).chunk(PER_BYTE) if len(ternary) else [ternary] * 4
    packed = torch.zeros_like(quarters[0], dtype=torch.uint8)
    for shift, quarter in zip(SHIFTS, quarters, strict=True):
        packed |= quarter << shift
    return packed


def unpack(packed: Tensor, where: str = "weight") -> Tensor:
    """The inverse of :func:`pack`: uint8 ``[rows, in]`` → int8 ``[4 · rows, in]``.

    Raises:
        PackedFormatError: for another dtype, or bytes with the code 3; naming row and byte.
    """
    length = packed.shape[-1] if packed.dim() else 0
    check_bytes(packed, length, length, lambda rows: (rows & (rows >> 1) & LOW_BITS) != 0, where)
    codes = torch.cat([(packed >> shift) & 3 for shift in SHIFTS])
    return codes.view(torch.int8) - 1
