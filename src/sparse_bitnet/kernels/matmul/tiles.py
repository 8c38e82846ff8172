"""Two-bit ternary weights in the order in which Hopper's tensor cores read them.

``hopper.cu`` says why and draws the layout: blocks of 64 rows and 128 columns, 2048 bytes each, in
which every thread of a warpgroup finds its 16 weights of a k32 step in one 32-bit word. Rows and
columns are padded with zeros to whole blocks. A weight that keeps 2:4 can be stored for the sparse
form of the instruction, in as many bytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_bitnet.formats import sparse24

ROWS, COLUMNS = 64, 128  # of a block
BLOCK_BYTES = ROWS * COLUMNS // 4
MOST_WEIGHTS = 2**22  # packed at once: intermediate values take bytes


def blocks(out: int, columns: int) -> tuple[int, int]:
    """Row blocks and k blocks of a weight ``[out, columns]``."""
    return -(-out // ROWS), -(-columns // COLUMNS)


def pack(ternary: Tensor, sparse: bool = False) -> Tensor:
    """int8 ``[out, in]`` with values in {−1, 0, 1} → uint8 ``[row blocks, k blocks, 2048]``.

    Raises:
        WeightError: for the sparse form, if four columns hold more than two non-zeros.
    """
    out, columns = ternary.shape
    row_blocks, k_blocks = blocks(out, columns)
    packed = torch.empty(
        (row_blocks, k_blocks, BLOCK_BYTES), dtype=torch.uint8, device=ternary.device
    )
    pack_blocks = _pack_sparse if sparse else _pack_dense
    step = max(1, MOST_WEIGHTS // max(1, k_blocks * COLUMNS * ROWS))
    for first in range(0, row_blocks, step):
        rows = ternary[first * ROWS : (first + step) * ROWS]
        padding = (0, k_blocks * COLUMNS - columns, 0, -rows.shape[0] % ROWS)
        packed[first : first + step] = pack_blocks(F.pad(rows, padding), k_blocks)
    return packed


def unpack(packed: Tensor, out: int, columns: int, sparse: bool = False) -> Tensor:
    """The inverse of :func:`pack`: int8 ``[out, columns]``."""
    ternary = (_unpack_sparse if sparse else _unpack_dense)(packed)
    return ternary[:out, :columns].contiguous()


def _pack_dense(rows: Tensor, k_blocks: int) -> Tensor:
    words = _words(rows).unflatten(1, (k_blocks, 4))
    # [row block, k block, step, warp, g, q, byte] → the step's word beside the thread's others
    return words.permute(0, 1, 3, 4, 5, 2, 6).reshape(-1, k_blocks, BLOCK_BYTES)


def _unpack_dense(packed: Tensor) -> Tensor:
    words = packed.view(*packed.shape[:2], 4, 8, 4, 4, 4).permute(0, 1, 5, 2, 3, 4, 6)
    return _ternary(words.flatten(1, 2))


def _pack_sparse(rows: Tensor, k_blocks: int) -> Tensor:
    kept, lanes = sparse24.pack(rows)
    words = _words(kept)
    # Rows as in _words; of a step's eight bytes half of four.
    lanes = lanes.view(-1, 4, 2, 8, 2 * k_blocks, 2, 4).permute(0, 4, 1, 3, 5, 2, 6)
    both = torch.stack([words, lanes.reshape(words.shape)], -2).unflatten(1, (k_blocks, 2))
    # [row block, k block, step, warp, g, q, words or lanes, byte]
    return both.permute(0, 1, 3, 4, 5, 2, 6, 7).reshape(-1, k_blocks, BLOCK_BYTES)


def _unpack_sparse(packed: Tensor) -> Tensor:
    both = packed.view(*packed.shape[:2], 4, 8, 4, 2, 2, 4).permute(0, 1, 5, 2, 3, 4, 6, 7)
    words, lanes = both.flatten(1, 2).unbind(-2)
    lanes = lanes.unflatten(4, (2, 2)).permute(0, 2, 5, 3, 1, 4, 6)
    kept = _ternary(words)
    return sparse24.unpack(kept, lanes.reshape(kept.shape[0], -1))


def _words(rows: Tensor) -> Tensor:
    """int8 ``[64·row blocks, 32·steps]`` → ``[row block, step, warp, g, q, byte]``: four a byte."""
    # Rows: block, warp, upper eight or not, g. Columns: step, upper sixteen or not, q, byte.
    codes = (rows.view(torch.uint8) & 3).view(-1, 4, 2, 8, rows.shape[1] // 32, 2, 4, 4)
    word = torch.zeros_like(codes[:, :, 0, :, :, 0])
    for upper_row in range(2):
        for upper_column in range(2):
            register = upper_row + 2 * upper_column
            word |= codes[:, :, upper_row, :, :, upper_column] << (6 - 2 * register)
    return word.permute(0, 3, 1, 2, 4, 5)


def _ternary(words: Tensor) -> Tensor:
    """The inverse of :func:`_words`."""
    row_blocks, steps = words.shape[:2]
    words = words.permute(0, 2, 3, 1, 4, 5)
    codes = words.new_empty((row_blocks, 4, 2, 8, steps, 2, 4, 4))
    for upper_row in range(2):
        for upper_column in range(2):
            pair = words >> (6 - 2 * (upper_row + 2 * upper_column)) & 3
            codes[:, :, upper_row, :, :, upper_column] = pair
    ternary = codes.view(row_blocks * ROWS, steps * 32)
    return (ternary ^ 2).view(torch.int8) - 2  # two's complement of two bits
