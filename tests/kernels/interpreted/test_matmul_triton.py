import ctypes
import mmap

import pytest
import torch

from sparse_bitnet.kernels.matmul import triton_dense, triton_finish, triton_packed, triton_swiglu
from sparse_bitnet.kernels.matmul.reference import ternary_matmul
from sparse_bitnet.kernels.matmul.triton_dense import Tiles
from sparse_bitnet.kernels.matmul.triton_packed import DotTiles, MmaTiles
from sparse_bitnet.kernels.quantize_activations.reference import quantize_fused

SHAPES = [(1, 40, 64), (1, 19, 512), (2, 50, 96), (3, 16, 256), (17, 33, 132), (40, 20, 50)]


def operands(tokens: int, out: int, inner: int) -> tuple[torch.Tensor, ...]:
    x = torch.randint(-128, 128, (tokens, inner), dtype=torch.int8)
    weight = torch.randint(-1, 2, (out, inner), dtype=torch.int8)
    return x, torch.rand(tokens), weight, torch.rand(out), torch.randn(out)


def poisoned(tokens: int, out: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full((tokens, out), torch.nan, dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_dense(shape: tuple[int, int, int], descriptors: bool, with_bias: bool) -> None:
    if descriptors and shape[2] % 16:
        pytest.skip("descriptors need rows of a multiple of 16 bytes")
    x, x_scale, weight, w_scale, bias = operands(*shape)
    given = bias if with_bias else None
    y = poisoned(*shape[:2])
    triton_dense.run(x, x_scale, weight, w_scale, given, y, Tiles(32, 16, 32, 4, 2, descriptors))
    assert torch.equal(y, ternary_matmul(x, x_scale.unsqueeze(-1), weight, w_scale, given))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "tiles",
    [
        DotTiles(4, 16, False),
        DotTiles(1, 16, True),
        DotTiles(2, 32, False, fetch=True),
        MmaTiles(16, 32, 1, 4, 2),
        MmaTiles(32, 16, 3, 4, 2),
    ],
)
def test_packed(shape: tuple[int, int, int], tiles: DotTiles | MmaTiles) -> None:
    if isinstance(tiles, DotTiles) and shape[0] > 4:
        pytest.skip("for few tokens")
    x, x_scale, weight, w_scale, bias = operands(*shape)
    for given in (None, bias):
        y = poisoned(*shape[:2], torch.float16)
        packed = triton_packed.pack_rows(weight)
        triton_packed.run(x, x_scale, packed, w_scale, given, y, tiles)
        expected = ternary_matmul(
            x, x_scale.unsqueeze(-1), weight, w_scale, given, out_dtype=torch.float16
        )
        assert torch.equal(y, expected)
        residual = torch.randn(shape[:2]).half()
        triton_packed.run(x, x_scale, packed, w_scale, given, y, tiles, residual)
        assert torch.equal(y, residual + expected)


def guarded(tensor: torch.Tensor, maps: list[mmap.mmap]) -> torch.Tensor:
    """A copy whose last byte is followed by a page without access."""
    size = tensor.numel() * tensor.element_size()
    end = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    maps.append(mmap.mmap(-1, end + mmap.PAGESIZE))
    everything = torch.frombuffer(maps[-1], dtype=torch.uint8)
    protect = ctypes.CDLL(None).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert protect(everything.data_ptr() + end, mmap.PAGESIZE, 0) == 0
    return everything[end - size : end].view(tensor.dtype).view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("inner", [4, 64, 68, 512, 576, 1028])
@pytest.mark.parametrize(
    "tiles",
    [
        DotTiles(8, 64, True),
        DotTiles(2, 32, False),
        DotTiles(4, 16, True),
        MmaTiles(16, 32, 3, 4, 2),
    ],
)
def test_packed_reads_nothing_beyond_its_operands(inner: int, tiles: DotTiles | MmaTiles) -> None:
    """Rows and words that fit the tile are loaded without masks."""
    maps: list[mmap.mmap] = []
    for tokens, out in ((1, 5), (2, 8)):
        x, x_scale, weight, w_scale, bias = operands(tokens, out, inner)
        expected = ternary_matmul(x, x_scale.unsqueeze(-1), weight, w_scale, bias)
        residual = torch.randn(tokens, out)
        packed = triton_packed.pack_rows(weight)
        y = poisoned(tokens, out)
        every = (x, x_scale, packed, w_scale, bias, y, residual)
        x, x_scale, packed, w_scale, bias, y, added = (guarded(t, maps) for t in every)
        triton_packed.run(x, x_scale, packed, w_scale, bias, y, tiles, added)
        assert torch.equal(y, residual + expected)


@pytest.mark.parametrize("name", triton_swiglu.SWIGLU_TILES)
@pytest.mark.parametrize(("tokens", "inner", "columns"), [(1, 40, 64), (2, 19, 132), (1, 3, 50)])
def test_swiglu(name: str, tokens: int, inner: int, columns: int) -> None:
    x, x_scale, weight, w_scale, _ = operands(tokens, 2 * inner, columns)
    packed = triton_packed.pack_rows(weight)
    found, scale = triton_swiglu.run_swiglu(x, x_scale, packed, w_scale, torch.float16, name)
    y = ternary_matmul(x, x_scale.unsqueeze(-1), weight, w_scale, None, torch.float16)
    expected, step = quantize_fused(y, swiglu=True)
    torch.testing.assert_close(scale, step, rtol=1e-3, atol=0)
    # exp of another library may round silu to the other side of an fp16 step.
    assert (found.int() - expected.int()).abs().max() <= 1
    assert (found != expected).float().mean() < 0.05


def test_swiglu_of_a_diverged_token_is_not_a_number() -> None:
    x, _, weight, w_scale, _ = operands(1, 16, 64)
    packed = triton_packed.pack_rows(weight)
    x_scale = torch.tensor([torch.nan])
    _, scale = triton_swiglu.swiglu_rows(x, x_scale, packed, w_scale, torch.float32)
    assert scale.isnan().all()


def test_largest_sums_fit() -> None:
    inner = 2**14
    x = torch.full((1, inner), -128, dtype=torch.int8)
    weight = torch.full((2, inner), -1, dtype=torch.int8)
    weight[1] = 1
    packed = triton_packed.pack_rows(weight)
    y = poisoned(1, 2)
    one = torch.ones(2)
    triton_packed.run(x, one[:1], packed, one, None, y, DotTiles(2, 256, True))
    assert y.tolist() == [[128.0 * inner, -128.0 * inner]]
    # The factor 64 of the layout: the longest row that is allowed still fits int32.
    assert 64 * 128 * (triton_packed.LONGEST_ROW - 1) < 2**31


def test_every_candidate_is_named_for_some_token_count() -> None:
    named = {name for tokens in range(1, 33) for name in triton_packed.candidates(tokens, 99)}
    assert named == set(triton_packed.CANDIDATES)
    x = torch.zeros(1, 32, dtype=torch.int8)
    named = {
        n for rows in (1, 40, 100, 999) for n in triton_dense.candidates(x.expand(rows, 32), x)
    }
    assert named <= set(triton_dense.CANDIDATES)
    assert not any(triton_dense.CANDIDATES[n].descriptors for n in named)


@pytest.mark.parametrize("tokens", [0, 3])
def test_matmul_entries(tokens: int) -> None:
    x, x_scale, weight, w_scale, bias = operands(tokens, 24, 64)
    expected = ternary_matmul(x, x_scale.unsqueeze(-1), weight, w_scale, bias) if tokens else None
    for y in (
        triton_dense.matmul(x, x_scale, weight, w_scale, bias, torch.float32),
        triton_packed.matmul(
            x, x_scale, triton_packed.pack_rows(weight), w_scale, bias, torch.float32
        ),
    ):
        assert y.shape == (tokens, 24)
        assert expected is None or torch.equal(y, expected)


def test_finish_scales_tokens_in_place() -> None:
    y = torch.randn(5, 2100).half()
    x_scale, bias = torch.rand(5), torch.randn(2100)
    expected = (y.float() * x_scale.unsqueeze(-1) + bias).half()
    triton_finish.finish(y, x_scale, bias)
    assert torch.equal(y, expected)
    triton_finish.finish(torch.empty(0, 8), torch.empty(0), None)
