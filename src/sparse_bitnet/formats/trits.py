"""Five weights in a byte (base 3), 1.6 bits a weight: the smallest storage by whole bytes.

Ternary weights carry at most log2(3) = 1.585 bits, and 3⁵ = 243 fits a byte. A weight w is the
digit w + 1, and a byte holds five of them in base three, the first one lowest:

    byte = d0 + 3·d1 + 9·d2 + 27·d3 + 81·d4        0 … 242; 243 and above are not used

A row whose length five does not divide is padded with weights of zero (digit 1).
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_bitnet.formats.rows import check_bytes, check_ternary, map_rows

PER_BYTE = 5
LARGEST_BYTE = 3**PER_BYTE - 1


def packed_length(length: int) -> int:
    """Bytes of a row of ``length`` weights."""
    return -(-length // PER_BYTE)


def pack(ternary: Tensor, where: str = "weight") -> Tensor:
    """int8 ``[..., in]`` with values in {−1, 0, 1} → uint8 ``[..., ceil(in / 5)]``.

    Raises:
        WeightError: if the tensor is not int8 or holds another value.
    """
    check_ternary(ternary, where)
    out_shape = (*ternary.shape[:-1], packed_length(ternary.shape[-1]))
    return map_rows(_pack_rows, ternary, ternary.new_empty(out_shape, dtype=torch.uint8))


def unpack(packed: Tensor, length: int, where: str = "weight") -> Tensor:
    """The inverse of :func:`pack`: uint8 ``[..., ceil(length / 5)]`` → int8 ``[..., length]``.

    Raises:
        PackedFormatError: as :func:`check`.
    """
    check(packed, length, where)
    out = packed.new_empty((*packed.shape[:-1], length), dtype=torch.int8)
    weights_of = _weights_of_bytes(packed.device)

    def unpack_rows(rows: Tensor) -> Tensor:
        weights = weights_of.index_select(0, rows.flatten().int())
        return weights.view(rows.shape[0], -1)[:, :length]

    return map_rows(unpack_rows, packed, out)


def check(packed: Tensor, length: int, where: str = "weight") -> None:
    """Refuse bytes that :func:`pack` never writes for rows of ``length`` weights.

    Raises:
        PackedFormatError: for another dtype or row length, for bytes above 242, for padding that
            is not zero; naming ``where``, row and byte.
    """
    used = length % PER_BYTE
    # Digits of one in the places that padding takes, divided down to the lowest place.
    padding = (3 ** (PER_BYTE - used) - 1) // 2

    def bad(rows: Tensor) -> Tensor:
        wrong = rows > LARGEST_BYTE
        if used:
            wrong[:, -1] |= rows[:, -1].int() // 3**used != padding
        return wrong

    check_bytes(packed, length, packed_length(length), bad, where)


def _pack_rows(rows: Tensor) -> Tensor:
    padded = F.pad(rows, (0, -rows.shape[-1] % PER_BYTE))
    digits = (padded + 1).view(torch.uint8).unflatten(-1, (-1, PER_BYTE)).unbind(-1)
    packed = digits[-1]
    for digit in reversed(digits[:-1]):
        packed = packed * 3 + digit
    return packed


@cache
def _weights_of_bytes(device: torch.device) -> Tensor:
    """int8 ``[256, 5]``: the weights each byte stands for."""
    places = torch.tensor([3**place for place in range(PER_BYTE)])
    digits = torch.arange(256).unsqueeze(-1) // places % 3
    return (digits - 1).to(torch.int8).to(device)
