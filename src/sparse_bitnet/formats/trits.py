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

from sparse_bitnet.formats.rows import Storage

PER_BYTE = 5
LARGEST_BYTE = 3**PER_BYTE - 1


def pack_rows(rows: Tensor) -> Tensor:
    padded = F.pad(rows, (0, -rows.shape[-1] % PER_BYTE))
    digits = (padded + 1).view(torch.uint8).unflatten(-1, (-1, PER_BYTE)).unbind(-1)
    packed = digits[-1]
    for digit in reversed(digits[:-1]):
        packed = packed * 3 + digit
    return packed


def unpack_rows(rows: Tensor, length: int) -> Tensor:
    weights = _weights_of_bytes(rows.device).index_select(0, rows.flatten().int())
    return weights.view(rows.shape[0], -1)[:, :length]


def wrong_bytes(rows: Tensor, length: int) -> Tensor:
    """True where a byte is above 242, or has padding that is not zero."""
    used = length % PER_BYTE
    wrong = rows > LARGEST_BYTE
    if used:
        # Digits of one in the places that padding takes, divided down to the lowest place.
        wrong[:, -1] |= rows[:, -1].int() // 3**used != (3 ** (PER_BYTE - used) - 1) // 2
    return wrong


@cache
def _weights_of_bytes(device: torch.device) -> Tensor:
    """int8 ``[256, 5]``: the weights each byte stands for."""
    places = torch.tensor([3**place for place in range(PER_BYTE)])
    digits = torch.arange(256).unsqueeze(-1) // places % 3
    return (digits - 1).to(torch.int8).to(device)


STORAGE = Storage("trits", PER_BYTE, pack_rows, unpack_rows, wrong_bytes)
