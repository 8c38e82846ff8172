"""Two-bit ternary weights in the order in which Hopper's tensor cores read them.

``hopper.cu`` says why and draws the layout: blocks of 64 rows and 128 columns, 2048 bytes each, in
which every thread of a warpgroup finds its 16 weights of a k32 step in one 32-bit word. Rows and
columns are padded with zeros to whole blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS, COLUMNS = 64, 128  # of a block
BLOCK_BYTES = ROWS * COLUMNS // 4
MOST_WEIGHTS = 2**22  # packed at once: intermediate values take bytes


def blocks(out: int, columns: int) -> tuple[int, int]:
    """Row blocks and k blocks of a weight ``[out, columns]``."""
    return -(-out // ROWS), -(-columns // COLUMNS)


def pack(ternary: Tensor) -> Tensor:
    """int8 ``[out, in]`` with values in {−1, 0, 1} → uint8 ``[row blocks, k blocks, 2048]``."""
    out, columns = ternary.shape
    row_blocks, k_blocks = blocks(out, columns)
    packed = torch.empty(
        (row_blocks, k_blocks, BLOCK_BYTES), dtype=torch.uint8, device=ternary.device
    )
    step = max(1, MOST_WEIGHTS // max(1, k_blocks * COLUMNS * ROWS))
    for first in range(0, row_blocks, step):
        rows = ternary[first * ROWS : (first + step) * ROWS]
        padding = (0, k_blocks * COLUMNS - columns, 0, -rows.shape[0] % ROWS)
        packed[first : first + step] = _pack_blocks(F.pad(rows, padding), k_blocks)
    return packed


def _pack_blocks(rows: Tensor, k_blocks: int) -> Tensor:
    codes = rows.view(torch.uint8) & 3
    # Rows: block, warp, upper eight or not, g. Columns: block, step, upper sixteen or not, q, byte.
    codes = codes.view(-1, 4, 2, 8, k_blocks, 4, 2, 4, 4)
    word = torch.zeros_like(codes[:, :, 0, :, :, :, 0])
    for upper_row in range(2):
        for upper_column in range(2):
            register = upper_row + 2 * upper_column
            word |= codes[:, :, upper_row, :, :, :, upper_column] << (6 - 2 * register)
    # [row block, warp, g, k block, j, q, byte] → [row block, k block, warp, g, q, j, byte]
    return word.permute(0, 3, 1, 2, 5, 4, 6).reshape(-1, k_blocks, BLOCK_BYTES)


def unpack(packed: Tensor, out: int, columns: int) -> Tensor:
    """The inverse of :func:`pack`: int8 ``[out, columns]``."""
    row_blocks, k_blocks, _ = packed.shape
    word = packed.view(row_blocks, k_blocks, 4, 8, 4, 4, 4).permute(0, 2, 3, 1, 5, 4, 6)
    codes = packed.new_empty((row_blocks, 4, 2, 8, k_blocks, 4, 2, 4, 4))
    for upper_row in range(2):
        for upper_column in range(2):
            pair = word >> (6 - 2 * (upper_row + 2 * upper_column)) & 3
            codes[:, :, upper_row, :, :, :, upper_column] = pair
    ternary = codes.view(row_blocks * ROWS, k_blocks * COLUMNS)[:out, :columns]
    return ((ternary ^ 2).view(torch.int8) - 2).contiguous()  # two's complement of two bits
