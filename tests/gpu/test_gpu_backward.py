"""The backward products on a GPU against float64 formulas and the reference's casts."""

import pytest
import torch
from torch import Tensor

from sparse_bitnet.core import Method, Pattern, quantize_int8
from sparse_bitnet.kernels.backward import fp8, gradients, reference
from sparse_bitnet.nn import SparseBitLinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
SHAPES = [(1, 16, 16), (33, 48, 80), (64, 128, 256), (4096, 256, 2048), (2048, 11008, 2048)]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def operands(tokens: int, out: int, inner: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    dy = (torch.randn(tokens, out) * torch.rand(tokens, 1) * 1e-2).to(dtype)
    x_q, x_scale = quantize_int8(torch.randn(tokens, inner) * (1 + torch.rand(tokens, 1)))
    ternary = torch.randint(-1, 2, (out, inner), dtype=torch.int8)
    return tuple(t.cuda() for t in (dy, x_q, x_scale, ternary))


def relative(ours: Tensor | None, exact: Tensor) -> float:
    assert ours is not None
    return float((ours.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("one_scale", [True, False])
@pytest.mark.parametrize("use_fp8", [False, True])
def test_products(shape: tuple[int, int, int], one_scale: bool, use_fp8: bool) -> None:
    dy, x_q, x_scale, ternary = operands(*shape, torch.bfloat16)
    w_scale = torch.full((shape[1],), 0.02) if one_scale else torch.rand(shape[1]) + 0.01
    w_scale = w_scale.cuda()
    dx, dw = gradients(dy, x_q, x_scale, ternary, w_scale, one_scale=one_scale, use_fp8=use_fp8)
    exact_dx = dy.double() @ (w_scale.double()[:, None] * ternary)
    exact_dw = dy.double().t() @ (x_q * x_scale.double())
    rounded = use_fp8 and fp8.serves(*shape)
    # bf16 operands and results: two roundings of 2⁻⁹. e4m3: two of 2⁻⁵, uniform.
    assert relative(dx, exact_dx) < (0.05 if rounded else 5e-3)
    assert relative(dw, exact_dw) < (0.06 if rounded else 5e-3)
    assert dw is not None
    assert dw.dtype == torch.float32


@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (37, 100), (16, 4096), (5, 11008), (3, 40000)])
@pytest.mark.parametrize("fold", [False, True])
def test_rows_equal_the_reference(shape: tuple[int, int], fold: bool) -> None:
    dy = (torch.randn(shape) * torch.rand(shape[0], 1) * 1e-3).bfloat16().cuda()
    factors = torch.rand(shape[1], device="cuda") if fold else None
    values, scale = torch.ops.sparse_bitnet.fp8_rows(dy, factors)
    expected, expected_scale = reference.fp8_rows(dy, factors)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("columns", [2048, 11008])
def test_compiled_rows_equal_the_reference(columns: int) -> None:
    dy = (torch.randn(64, columns) * torch.logspace(-20, 20, 64).unsqueeze(-1)).cuda()
    dy[5] = 0
    values, scale = torch.compile(reference.fp8_rows, fullgraph=True)(dy, None)
    expected, expected_scale = reference.fp8_rows(dy, None)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))
    dy[3, 7] = float("nan")
    dy[4, 7] = float("inf")
    _, scale = torch.compile(reference.fp8_rows, fullgraph=True)(dy, None)
    assert scale[3:5].isnan().all()
    assert torch.equal(scale[5:], expected_scale[5:])


@pytest.mark.parametrize("shape", [(4, 1), (128, 128), (132, 70), (1000, 3000), (0, 4)])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("factored", [False, True])
def test_transposition_equals_the_reference(
    shape: tuple[int, int], kind: str, factored: bool
) -> None:
    if kind == "int8":
        values = torch.randint(-128, 128, shape, dtype=torch.int8).cuda()
        factor = 1 + torch.rand(shape[0])
    else:
        values = (
            (torch.randn(shape) * 100).clamp(-448, 448).to(reference.FP8).cuda()
        )  # NaN has two bytes
        factor = torch.exp2(-(torch.arange(shape[0]) % 20).float())
    given = factor.cuda() if factored else None
    ours = torch.ops.sparse_bitnet.fp8_transposed(values, given)
    expected = reference.fp8_transposed(values, given)
    assert torch.equal(ours.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_fp8_shows_what_is_not_finite(bad: float) -> None:
    dy, x_q, x_scale, ternary = operands(64, 32, 64, torch.bfloat16)
    dy[3, 5] = bad
    w_scale = torch.full((32,), 0.02, device="cuda")
    dx, dw = gradients(dy, x_q, x_scale, ternary, w_scale, one_scale=True, use_fp8=True)
    assert dx is not None
    assert dw is not None
    assert not torch.isfinite(dx[3]).any()
    assert torch.isfinite(dx[4]).all()
    assert not torch.isfinite(dw).all()


def _layer(method: Method) -> SparseBitLinear:
    torch.manual_seed(0)
    linear = torch.nn.Linear(512, 256, device="cuda")
    return SparseBitLinear(linear, Pattern(6, 8), method)


def _step(module: SparseBitLinear, x: Tensor) -> tuple[Tensor, ...]:
    x = x.detach().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        y = module(x)
    y.float().square().sum().backward()
    grads = (y.detach(), x.grad, module.weight.grad, module.bias.grad)
    assert all(g is not None for g in grads)
    module.zero_grad()
    return grads


@pytest.mark.parametrize("backward", ["full", "fp8"])
def test_compiled_and_captured(backward: str) -> None:
    module = _layer(Method(backward=backward))
    x = torch.randn(4, 64, 512, device="cuda")
    eager = _step(module, x)
    module.compile(fullgraph=True)
    compiled = _step(module, x)
    for ours, theirs in zip(compiled, eager, strict=True):
        assert relative(ours, theirs.double()) < 5e-3

    inside = x.clone().requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())

    def step() -> None:
        module.zero_grad()
        inside.grad = None
        with torch.autocast("cuda", torch.bfloat16):
            y = module(inside)
        y.float().square().sum().backward()

    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    module.zero_grad()
    inside.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with torch.autocast("cuda", torch.bfloat16):
            y = module(inside)
        y.float().square().sum().backward()
    other = torch.randn_like(x)
    with torch.no_grad():
        inside.copy_(other)
    graph.replay()
    replayed = [g.clone() for g in (inside.grad, module.weight.grad)]
    module.zero_grad()
    expected = _step(module, other)
    assert relative(replayed[0], expected[1].double()) < 5e-3
    assert relative(replayed[1], expected[2].double()) < 5e-3
