"""Tile order of two-bit weights, against the fragment layout that PTX documents, written out."""

import pytest
import torch

from sparse_bitnet.core import WeightError
from sparse_bitnet.kernels.matmul import tiles


def random_ternary(out, columns, seed=0):
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


def keeping_2_4(out, columns, seed=0):
    ternary = random_ternary(out, columns, seed)
    fours = ternary.view(out, -1, 4)
    generator = torch.Generator().manual_seed(seed)
    gone = torch.rand(fours.shape, generator=generator).argsort(-1)[..., :2]
    fours.scatter_(-1, gone, 0)
    return ternary


@pytest.mark.parametrize("shape", [(64, 128), (1, 4), (65, 132), (300, 260), (128, 640)])
def test_unpack_inverts_pack_of_the_sparse_form(shape):
    ternary = keeping_2_4(*shape)
    packed = tiles.pack(ternary, sparse=True)
    assert packed.shape == (*tiles.blocks(*shape), tiles.BLOCK_BYTES)
    assert torch.equal(tiles.unpack(packed, *shape, sparse=True), ternary)


def test_the_sparse_form_drops_nothing():
    with pytest.raises(WeightError, match="3 non-zeros in four lanes"):
        tiles.pack(torch.tensor([[1, 0, -1, 1]], dtype=torch.int8), sparse=True)


def test_sparse_fragments_and_metadata_are_those_of_ptx():
    """PTX ISA, wgmma.sp m64nNk64, 8-bit A: kept values as the dense k32 fragment's, of half of K.

    Metadata: thread 4g + 2h + u of a warp holds, for row g + 8u, the eight fours of columns
    32h … 32h + 31 of the step, four bits each: the lanes of its two kept values, ascending.
    """
    ternary = keeping_2_4(130, 300, seed=3)
    words = tiles.pack(ternary, sparse=True).view(torch.int32).view(*tiles.blocks(130, 300), 128, 4)
    padded = torch.zeros(192, 384, dtype=torch.int8)
    padded[:130, :300] = ternary
    generator = torch.Generator().manual_seed(1)

    def word(row_block, k_block, thread, index):
        return int(words[row_block, k_block, thread, index]) & 0xFFFFFFFF

    for _ in range(500):
        row_block, k_block, warp, row, step, kept = (
            int(torch.randint(n, (), generator=generator)) for n in (3, 3, 4, 16, 2, 32)
        )
        g, upper = row % 8, row // 8
        # The kept value: its thread, register and byte in the fragment of k32.
        thread = 32 * warp + 4 * g + kept % 16 // 4
        register = upper + 2 * (kept // 16)
        codes = word(row_block, k_block, thread, 2 * step) << 2 * register & 0xC0C0C0C0
        value = codes >> 8 * (kept % 4) & 0xFF
        # Its lane in its four.
        four = kept // 2
        holder = 32 * warp + 4 * g + 2 * (four // 8) + upper
        nibble = word(row_block, k_block, holder, 2 * step + 1) >> 4 * (four % 8) & 15
        lanes = nibble & 3, nibble >> 2
        assert lanes[0] < lanes[1]
        column = 128 * k_block + 64 * step + 4 * four + lanes[kept % 2]
        assert value == 64 * int(padded[64 * row_block + 16 * warp + row, column]) & 0xFF
