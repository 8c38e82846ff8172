"""Triton's interpreter truncates to bf16 and loses the carry of a rounding to e4m3. So SwiGLU
rounds to float16 here, and a carried e4m3 value may be half of what it should be; tests/gpu/ has
neither."""

import pytest
import torch
from torch import Tensor

from sparse_bitnet.kernels.swiglu import reference, triton

SHAPES = [(0, 8), (1, 1), (3, 64), (5, 100), (2, 1600), (1, 3333)]


def inputs(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gate, up = torch.randn(2, *shape, generator=generator) * 2
    return gate.bfloat16(), up.bfloat16()


def close(ours: Tensor, theirs: Tensor) -> bool:
    """To a step of e4m3, but for lost carries."""
    a, b = ours.float(), theirs.float()
    lost_carry = (a * 2 == b) & (torch.frexp(b).mantissa.abs() == 0.5)
    return bool((((a - b).abs() <= b.abs() / 8 + 2**-9) | lost_carry).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 40)])
def test_quantize(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate, up = (t.to(dtype) for t in inputs(*shape))
    quantized, scale = triton.quantize(gate, up)
    expected, step = reference.quantize(gate, up)
    assert quantized.shape == expected.shape
    # An exponential that differs in its last bit may round to the next float16.
    torch.testing.assert_close(scale, step, rtol=2**-10, atol=0)
    different = (quantized.int() - expected.int()).abs()
    assert not (different > 1).any()
    assert int(different.sum()) <= different.numel() / 1000


@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_gradients(shape: tuple[int, int]) -> None:
    gate, up = inputs(*shape)
    dh, _ = inputs(*shape, seed=1)
    factor = torch.exp2(-torch.arange(shape[0]).float()) * 0.7
    ours = triton.fp8_gradients(dh, factor, gate, up)
    expected = reference.fp8_gradients(dh, factor, gate, up)
    for values, scale, other, other_scale in (
        (*ours[:2], *expected[:2]),
        (*ours[2:], *expected[2:]),
    ):
        assert torch.equal(scale, other_scale)
        assert close(values, other)


def test_strides() -> None:
    gate, up = inputs(4, 160)
    dh, _ = inputs(4, 160, seed=1)
    factor = torch.ones(8)[::2]
    views = [t[:, ::2] for t in (dh, gate, up)]
    ours = triton.fp8_gradients(views[0], factor, *views[1:])
    whole = triton.fp8_gradients(
        views[0].contiguous(), factor, *(v.contiguous() for v in views[1:])
    )
    for one, other in zip(ours, whole, strict=True):
        assert torch.equal(one.float(), other.float())
    for one, other in zip(
        triton.quantize(*views[1:]),
        triton.quantize(*(v.contiguous() for v in views[1:])),
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
def test_edges() -> None:
    """Zeros, the ends of the sigmoid, and what is not finite."""
    gate, up = inputs(6, 64)
    dh, _ = inputs(6, 64, seed=1)
    dh[0] = 0
    gate[1], gate[2] = 300.0, -300.0
    dh[3, 5] = torch.nan
    gate[4, 5] = torch.inf
    up[5, 5] = torch.inf
    ours = triton.fp8_gradients(dh, torch.ones(6), gate, up)
    expected = reference.fp8_gradients(dh, torch.ones(6), gate, up)
    for scale, other in zip(ours[1::2], expected[1::2], strict=True):
        torch.testing.assert_close(scale, other, rtol=0, atol=0, equal_nan=True)
    for values, other in zip(ours[::2], expected[::2], strict=True):
        assert close(values[:3], other[:3])
    assert ours[1][3].isnan()
    assert ours[3][3].isnan()
    _, scale = triton.quantize(gate, up)
    _, step = reference.quantize(gate, up)
    assert torch.equal(scale.isfinite(), step.isfinite())
    assert scale[:3].isfinite().all()
    assert not scale[4:].isfinite().any()


@pytest.mark.parametrize("columns", [1, 100, 4864, 8960, 11008, 18944, 60000])
@pytest.mark.parametrize("launch", [triton.FORWARD, triton.BACKWARD])
def test_launches_cover_a_row(launch: triton.Launch, columns: int) -> None:
    options = launch.options(columns)
    assert options["CHUNK"] * options["CHUNKS"] >= columns
    assert options["CHUNK"] * (options["CHUNKS"] - 1) < columns
    assert options["CHUNK"] & (options["CHUNK"] - 1) == 0
    assert options["CHUNKS"] <= 8
    assert options["num_warps"] * 32 * (options["maxnreg"] or 64) <= triton.REGISTERS
