"""Four weights in a byte, 2 bits a weight: the fastest storage to unpack.

A weight w is the code w + 1 (0, 1 or 2; 3 is not used). A row's weights follow each other from the
low bits of its first byte:

    bit      7 6   5 4   3 2   1 0
    byte 0 │ w3  │ w2  │ w1  │ w0  │
    byte 1 │ w7  │ w6  │ w5  │ w4  │   …

A row whose length four does not divide is padded with weights of zero (code 1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_bitnet.formats.rows import Storage

PER_BYTE = 4
SHIFTS = (0, 2, 4, 6)
LOW_BITS = 0b01010101  # the low bit of each code; also four codes of weight zero


def pack_rows(rows: Tensor) -> Tensor:
    """:func:`pack` without a check of what is packed, which a GPU would have to wait for."""
    padded = F.pad(rows, (0, -rows.shape[-1] % PER_BYTE))
    lanes = (padded + 1).view(torch.uint8).unflatten(-1, (-1, PER_BYTE))
    return lanes[..., 0] | lanes[..., 1] << 2 | lanes[..., 2] << 4 | lanes[..., 3] << 6


def unpack_rows(rows: Tensor, length: int) -> Tensor:
    """:func:`unpack` without a check of what is unpacked."""
    codes = torch.stack([(rows >> shift) & 3 for shift in SHIFTS], dim=-1)
    # A cast, not a view: a compiler joins it with what reads the weight.
    return codes.flatten(-2)[..., :length].to(torch.int8) - 1


def wrong_bytes(rows: Tensor, length: int) -> Tensor:
    """True where a byte has the code 3, or padding that is not zero."""
    used = length % PER_BYTE
    wrong = (rows & (rows >> 1) & LOW_BITS) != 0
    if used:
        wrong[:, -1] |= (rows[:, -1] >> 2 * used) != LOW_BITS >> 2 * used
    return wrong


STORAGE = Storage("two-bit", PER_BYTE, pack_rows, unpack_rows, wrong_bytes)
packed_length, pack, unpack = STORAGE.packed_length, STORAGE.pack, STORAGE.unpack
