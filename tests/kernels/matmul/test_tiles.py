"""Tile order of two-bit weights, against the fragment layout that PTX documents, written out."""

from __future__ import annotations

import pytest
import torch

from sparse_bitnet.kernels.matmul import tiles


def random_ternary(out: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (out, columns), dtype=torch.int8, generator=generator)


@pytest.mark.parametrize("shape", [(64, 128), (1, 1), (65, 129), (300, 257), (128, 640)])
def test_unpack_inverts_pack(shape):
    ternary = random_ternary(*shape)
    packed = tiles.pack(ternary)
    assert packed.shape == (*tiles.blocks(*shape), tiles.BLOCK_BYTES)
    assert torch.equal(tiles.unpack(packed, *shape), ternary)


def test_two_bits_a_weight():
    assert tiles.pack(random_ternary(128, 256)).numel() * 4 == 128 * 256


def test_chunks_of_rows_do_not_matter(monkeypatch):
    ternary = random_ternary(64 * 5 + 3, 200)
    whole = tiles.pack(ternary)
    monkeypatch.setattr(tiles, "MOST_WEIGHTS", 1)
    assert torch.equal(tiles.pack(ternary), whole)


def test_fragments_are_those_of_ptx():
    """PTX ISA, wgmma m64nNk32, 8-bit A in registers: byte b of register i of thread t.

    Row: 16 · (t / 32) + (t % 32) / 4 + 8 · (i % 2). Column: 4 · (t % 4) + b + 16 · (i / 2).
    """
    ternary = random_ternary(130, 300, seed=3)
    words = tiles.pack(ternary).view(torch.int32).view(*tiles.blocks(130, 300), 128, 4)
    padded = torch.zeros(192, 384, dtype=torch.int8)
    padded[:130, :300] = ternary
    generator = torch.Generator().manual_seed(1)
    for _ in range(500):
        row_block, k_block, thread, step, register, byte = (
            int(torch.randint(n, (), generator=generator)) for n in (3, 3, 128, 4, 4, 4)
        )
        word = int(words[row_block, k_block, thread, step]) & 0xFFFFFFFF
        value = (word << 2 * register & 0xC0C0C0C0) >> 8 * byte & 0xFF  # as the kernel unpacks it
        row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (register % 2)
        column = 32 * step + 4 * (thread % 4) + byte + 16 * (register // 2)
        expected = int(padded[64 * row_block + row, 128 * k_block + column])
        assert value == 64 * expected & 0xFF
