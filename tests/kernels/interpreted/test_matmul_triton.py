import ctypes
import mmap

import pytest
import torch

from sparse_bitnet.formats import two_bit
from sparse_bitnet.kernels import matmul
from sparse_bitnet.kernels.matmul import (
    tiles,
    triton_dense,
    triton_tiles,
    triton_two_bit,
    triton_two_bit_kernels,
)
from sparse_bitnet.kernels.matmul.reference import ternary_matmul
from sparse_bitnet.kernels.matmul.triton_dense import Tiles
from sparse_bitnet.kernels.matmul.triton_two_bit import Tiles as TwoBitTiles

SHAPES = [(1, 40, 64), (1, 19, 512), (2, 50, 96), (3, 16, 256), (17, 33, 132), (40, 20, 50)]


def operands(tokens, out, inner):
    x = torch.randint(-128, 128, (tokens, inner), dtype=torch.int8)
    weight = torch.randint(-1, 2, (out, inner), dtype=torch.int8)
    return x, torch.rand(tokens), weight, torch.rand(out), torch.randn(out)


def poisoned(tokens, out, dtype=torch.float32):
    return torch.full((tokens, out), torch.nan, dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_dense(shape):
    x, x_scale, weight, w_scale, bias = operands(*shape)
    given = bias if shape[0] != 1 else None
    y = poisoned(*shape[:2])
    triton_dense.run(x, x_scale, weight, w_scale, given, y, Tiles(32, 16, 32, 4, 2))
    assert torch.equal(y, ternary_matmul(x, x_scale.unsqueeze(-1), weight, w_scale, given))


TWO_BIT = [TwoBitTiles(16, 16, 32, 1, 4, 2), TwoBitTiles(16, 32, 16, 3, 4, 2)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tiles", TWO_BIT)
def test_two_bit(shape, tiles):
    x, x_scale, weight, w_scale, bias = operands(*shape)
    packed = triton_two_bit.pack_rows(weight)
    given = bias if shape[0] != 1 else None
    y = poisoned(*shape[:2], torch.float16)
    triton_two_bit_kernels.run(x, x_scale, packed, w_scale, given, y, tiles)
    expected = ternary_matmul(
        x, x_scale.unsqueeze(-1), weight, w_scale, given, out_dtype=torch.float16
    )
    assert torch.equal(y, expected)


def guarded(tensor, maps):
    """A copy whose last byte is followed by a page without access."""
    size = tensor.numel() * tensor.element_size()
    end = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    maps.append(mmap.mmap(-1, end + mmap.PAGESIZE))
    everything = torch.frombuffer(maps[-1], dtype=torch.uint8)
    protect = ctypes.CDLL(None).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert protect(everything.data_ptr() + end, mmap.PAGESIZE, 0) == 0
    return everything[end - size : end].view(tensor.dtype).view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("inner", [4, 68, 576])
@pytest.mark.parametrize("tiles", TWO_BIT)
def test_two_bit_reads_nothing_beyond_its_operands(inner, tiles):
    maps = []
    for tokens, out in ((1, 5), (18, 8)):
        x, x_scale, weight, w_scale, bias = operands(tokens, out, inner)
        expected = ternary_matmul(x, x_scale.unsqueeze(-1), weight, w_scale, bias)
        every = (x, x_scale, triton_two_bit.pack_rows(weight), w_scale, bias, poisoned(tokens, out))
        *given, y = (guarded(t, maps) for t in every)
        triton_two_bit_kernels.run(*given, y, tiles)
        assert torch.equal(y, expected)


def test_largest_sums_fit():
    inner = 2**12
    x = torch.full((1, inner), -128, dtype=torch.int8)
    weight = torch.full((2, inner), -1, dtype=torch.int8)
    weight[1] = 1
    packed = triton_two_bit.pack_rows(weight)
    y = poisoned(1, 2)
    one = torch.ones(2)
    triton_two_bit_kernels.run(x, one[:1], packed, one, None, y, TWO_BIT[0])
    assert y.tolist() == [[128.0 * inner, -128.0 * inner]]
    # The factor 64 of the layout: the longest row that is allowed still fits int32.
    assert 64 * 128 * (triton_two_bit.LONGEST_ROW - 1) < 2**31


@pytest.mark.parametrize("tokens", [0, 3])
def test_matmul_entries(tokens):
    x, x_scale, weight, w_scale, bias = operands(tokens, 24, 64)
    expected = ternary_matmul(x, x_scale.unsqueeze(-1), weight, w_scale, bias) if tokens else None
    for y in (
        triton_dense.matmul(x, x_scale, weight, w_scale, bias, torch.float32),
        triton_two_bit._matmul(
            x, x_scale, triton_two_bit.pack_rows(weight), w_scale, bias, torch.float32
        ),
    ):
        assert y.shape == (tokens, 24)
        assert expected is None or torch.equal(y, expected)


@pytest.mark.parametrize("tokens", [1, 3])
def test_strides_of_products(tokens):
    """Operands may begin anywhere and have any strides; every second lane is not to be read."""
    x_q = torch.randint(-128, 128, (tokens, 130), dtype=torch.int8)
    weight = torch.randint(-1, 2, (24, 130), dtype=torch.int8)
    x_scale, w_scale, bias = torch.rand(2 * tokens)[::2], torch.rand(48)[::2], torch.randn(48)[::2]
    x_scale = x_scale.unsqueeze(-1)
    for x, rows in ((x_q[:, 1:65], weight[:, 1:65]), (x_q[:, ::2], weight[:, ::2])):
        expected = ternary_matmul(x, x_scale, rows, w_scale, bias)
        packed = triton_two_bit.pack_rows(rows)
        dense = matmul._dense(x, x_scale, rows, w_scale, bias, torch.float32)
        assert torch.equal(dense, expected)
        few = triton_two_bit._matmul(x, x_scale, packed, w_scale, bias, torch.float32)
        assert torch.equal(few, expected)


@pytest.mark.parametrize("shape", [(64, 128), (1, 4), (65, 132), (130, 300), (3, 129)])
def test_tile_order(shape):
    ternary = torch.randint(-1, 2, shape, dtype=torch.int8)
    packed = two_bit.pack(ternary)
    assert torch.equal(triton_tiles.pack(packed, shape[1]), tiles.pack(ternary))
    assert torch.equal(triton_tiles.unpack(packed)[:, : shape[1]], ternary)
