# mypy: disable-error-code="no-untyped-def"
"""Trained weights in two bits, row by row → the tile order of ``tiles.py``, or int8.

A trained weight changes at every step, so it is put in order in every forward: a read and a write
of a quarter of a byte for each weight, little beside the product of many tokens. A program makes
one block of 64 × 128: register i of a thread is four neighbouring columns of a row, one byte.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_bitnet.kernels.matmul import tiles

BYTES = 1024


@triton.jit
def _spread(codes):
    """The four bit pairs of a byte, one in each byte of a word."""
    halves = (codes | (codes << 12)) & 0x000F000F
    return (halves | (halves << 6)) & 0x03030303


@triton.jit
def _pack_kernel(rows_ptr, packed_ptr, rows, row_bytes, k_blocks, WORDS: tl.constexpr):
    row_block = tl.program_id(0).to(tl.int64)
    k_block = tl.program_id(1)
    index = tl.arange(0, WORDS)
    thread, step = index // 4, index % 4
    warp, g, q = thread // 32, thread % 32 // 4, thread % 4
    word = tl.zeros((WORDS,), tl.int32)
    for register in tl.static_range(4):
        row = row_block * 64 + 16 * warp + g + 8 * (register % 2)
        column = k_block * 32 + 8 * step + q + 4 * (register // 2)  # of bytes
        inside = (row < rows) & (column < row_bytes)
        # Codes w + 1; 01, a weight of zero, outside.
        codes = tl.load(rows_ptr + row * row_bytes + column, mask=inside, other=0x55).to(tl.int32)
        # w + 1 → w in two bits: 00, 01, 10 → 11, 00, 01.
        word |= ((_spread(codes) + 0x03030303) & 0x03030303) << (6 - 2 * register)
    tl.store(packed_ptr + (row_block * k_blocks + k_block) * WORDS + index, word)


def pack(packed_rows: Tensor, columns: int) -> Tensor:
    """``tiles.pack`` of a weight ``[out, columns]`` that is contiguous ``formats.two_bit``."""
    out, row_bytes = packed_rows.shape
    row_blocks, k_blocks = tiles.blocks(out, columns)
    packed = torch.empty(
        (row_blocks, k_blocks, tiles.BLOCK_BYTES), dtype=torch.uint8, device=packed_rows.device
    )
    _pack_kernel[(row_blocks, k_blocks)](
        packed_rows,
        packed.view(torch.int32),
        out,
        row_bytes,
        k_blocks,
        WORDS=tiles.BLOCK_BYTES // 4,
    )
    return packed


@triton.jit
def _unpack_kernel(packed_ptr, ternary_ptr, count, BYTES: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    inside = at < count
    codes = tl.load(packed_ptr + at, mask=inside, other=0).to(tl.int32)
    pairs = _spread(codes)
    ones = (pairs >> 1) & 0x01010101
    negative = ~(pairs | (pairs >> 1)) & 0x01010101
    word = ones | ((negative << 8) - negative)  # 255 for each negative byte
    tl.store(ternary_ptr.to(tl.pointer_type(tl.int32)) + at, word, mask=inside)


def unpack(packed_rows: Tensor) -> Tensor:
    """Contiguous ``formats.two_bit`` of rows that fill their bytes → int8 ``[out, 4·bytes]``."""
    shape = (*packed_rows.shape[:-1], packed_rows.shape[-1] * 4)
    ternary = torch.empty(shape, dtype=torch.int8, device=packed_rows.device)
    count = packed_rows.numel()
    _unpack_kernel[(triton.cdiv(count, BYTES),)](packed_rows, ternary, count, BYTES=BYTES)
    return ternary
