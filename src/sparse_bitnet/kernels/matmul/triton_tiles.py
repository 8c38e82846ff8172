# mypy: disable-error-code="no-untyped-def"
"""int8 ternary weights → the tile order of ``tiles.py``, by one kernel.

A trained weight changes at every step, so its order is made in every forward: a read of a byte and
a write of a quarter for each weight, little beside the product of many tokens. A program makes one
block of 64 × 128: register i of a thread is four neighbouring columns of a row, one int32 load.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_bitnet.kernels.matmul import tiles


@triton.jit
def _pack_kernel(ternary_ptr, packed_ptr, rows, columns, k_blocks, WORDS: tl.constexpr):
    row_block = tl.program_id(0).to(tl.int64)
    k_block = tl.program_id(1)
    index = tl.arange(0, WORDS)
    thread, step = index // 4, index % 4
    warp, g, q = thread // 32, thread % 32 // 4, thread % 4
    word = tl.zeros((WORDS,), tl.int32)
    for register in tl.static_range(4):
        row = row_block * 64 + 16 * warp + g + 8 * (register % 2)
        column = k_block * 128 + 32 * step + 4 * q + 16 * (register // 2)
        inside = (row < rows) & (column < columns)
        at = (ternary_ptr + row * columns + column).to(tl.pointer_type(tl.int32))
        codes = tl.load(at, mask=inside, other=0)
        word |= (codes & 0x03030303) << (6 - 2 * register)
    tl.store(packed_ptr + (row_block * k_blocks + k_block) * WORDS + index, word)


def pack(ternary: Tensor) -> Tensor:
    """As ``tiles.pack``, of a contiguous int8 ``[out, in]`` whose rows begin at whole words."""
    out, columns = ternary.shape
    row_blocks, k_blocks = tiles.blocks(out, columns)
    packed = torch.empty(
        (row_blocks, k_blocks, tiles.BLOCK_BYTES), dtype=torch.uint8, device=ternary.device
    )
    _pack_kernel[(row_blocks, k_blocks)](
        ternary, packed.view(torch.int32), out, columns, k_blocks, WORDS=tiles.BLOCK_BYTES // 4
    )
    return packed
