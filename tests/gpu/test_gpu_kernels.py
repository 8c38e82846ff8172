"""Every kernel on a GPU against the reference on CPU: equal integers, tight floats."""

import pytest
import torch
from torch._dynamo.utils import counters

from sparse_bitnet.core import Pattern, quantize_int8, row_scale, ternarize
from sparse_bitnet.kernels import quantize_activations
from sparse_bitnet.kernels import ternarize as ternarize_anywhere
from sparse_bitnet.kernels import ternary_matmul as matmul_anywhere
from sparse_bitnet.kernels.matmul.reference import ternary_matmul
from sparse_bitnet.kernels.quantize_activations import quantize_fused, reference
from sparse_bitnet.kernels.registry import (
    BACKENDS,
    TernaryWeight,
    integer_linear,
    prepare,
    ternary_linear,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
BF16_STEP = 2.0**-8  # spacing of bf16 relative to the value, at most


@pytest.fixture(autouse=True)
def _poisoned_memory() -> None:
    # Results lie where these were freed, poisoned: bytes of 255 are NaN in any float, −1 in int8.
    sizes = [2**12, 2**16, 2**19, 2**22] * 16
    poison = [torch.full((n,), 255, dtype=torch.uint8, device="cuda") for n in sizes]
    del poison
    torch.manual_seed(0)


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 63, 896, 2048, 3584, 4100, 18944, 40000])
@pytest.mark.parametrize("tokens", [0, 1, 37])
def test_quantize(tokens: int, columns: int, dtype: torch.dtype) -> None:
    x = (torch.randn(tokens, columns) * torch.rand(tokens, 1) * 5).to(dtype)
    quantized, scale = quantize_activations(x.cuda())
    if tokens:
        expected, step = quantize_int8(x)
        assert_equal(quantized, expected)
        assert_equal(scale, step)


@pytest.mark.parametrize("swiglu", [False, True])
def test_quantize_fused(swiglu: bool) -> None:
    x = torch.randn(33, 7168, dtype=torch.bfloat16)
    weight = None if swiglu else torch.rand(7168).bfloat16()
    on_gpu = None if weight is None else weight.cuda()
    quantized, scale = quantize_fused(x.cuda(), on_gpu, 1e-6, swiglu)
    expected, step = reference.quantize_fused(x, weight, 1e-6, swiglu)
    # bf16 roundings of exp and rsqrt may fall on the other side: one bf16 step of the magnitude.
    torch.testing.assert_close(scale.cpu(), step, rtol=BF16_STEP, atol=0)
    difference = (quantized.cpu().int() - expected.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.02


def test_quantize_lets_nan_through() -> None:
    x = torch.randn(3, 5000, device="cuda")
    x[1, 4999] = torch.nan
    _, scale = quantize_activations(x)
    assert scale.isnan().flatten().tolist() == [False, True, False]


@pytest.mark.parametrize(
    "name", ["dense", "6:8", "2:4", "1:4", "4:6", "8:10", "7:16", "8:32", "5:7", "3:31"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ternarize(name: str, dtype: torch.dtype) -> None:
    pattern = Pattern.parse(name)
    weight = torch.randn(2, 30, 40 * pattern.m) * 0.02
    for full in (weight, (weight * 100).round() / 100, weight[0]):
        version = full.to(dtype)
        for shard_sizes in ((), (7, 22, 1)):
            ternary, scale = ternarize_anywhere(version.cuda(), pattern, None, shard_sizes)
            expected, gamma = ternarize(version, pattern, None, shard_sizes)
            assert_equal(ternary, expected)
            assert_equal(scale, gamma)


def prepared(
    out: int, columns: int, name: str, backend: str | None = None
) -> tuple[TernaryWeight, torch.Tensor]:
    pattern = Pattern.parse(name)
    ternary, scale = ternarize(torch.randn(out, columns), pattern, None, (out // 4, out - out // 4))
    rows = row_scale(scale, (out // 4, out - out // 4), out)
    return prepare(ternary.cuda(), rows.cuda(), backend=backend), rows


def backends() -> list[str]:
    device = torch.device("cuda", 0)
    return [name for name, one in BACKENDS.items() if one.serves(device)]


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4, 5, 16, 17, 32, 33, 64, 100, 1000])
@pytest.mark.parametrize("name", ["dense", "6:8", "2:4"])
def test_linear(tokens: int, name: str) -> None:
    out, columns = 544, 1920
    x, bias = torch.randn(tokens, columns).bfloat16(), torch.randn(out)
    for backend in backends():
        weight, rows = prepared(out, columns, name, backend)
        for dtype in (torch.bfloat16, torch.float32, torch.float16):
            y = ternary_linear(x.cuda(), weight, bias.cuda(), dtype)
            assert y.shape == (tokens, out)
            assert y.dtype == dtype
            if tokens:
                x_q, x_scale = quantize_int8(x)
                ternary = weight.unpack().cpu()
                assert_equal(y, ternary_matmul(x_q, x_scale, ternary, rows, bias, dtype))


@pytest.mark.parametrize("shape", [(544, 1920), (130, 332), (33, 70)])
@pytest.mark.parametrize("tokens", [40, 512, 1300])
def test_a_trained_weight(tokens: int, shape: tuple[int, int]) -> None:
    """An int8 ternary weight; from 512 tokens on Hopper multiplies it from two bits."""
    ternary = torch.randint(-1, 2, shape, dtype=torch.int8)
    x_q = torch.randint(-127, 128, (tokens, shape[1]), dtype=torch.int8)
    x_scale, w_scale, bias = torch.rand(tokens, 1), torch.rand(shape[0]), torch.randn(shape[0])
    for given in (None, bias, bias.double()):
        on_gpu = [t if t is None else t.cuda() for t in (x_q, x_scale, ternary, w_scale, given)]
        for dtype in (torch.bfloat16, torch.float32):
            expected = ternary_matmul(x_q, x_scale, ternary, w_scale, given, dtype)
            assert_equal(matmul_anywhere(*on_gpu, dtype), expected)


def test_linear_of_odd_shapes() -> None:
    for out, columns in ((33, 72), (100, 8), (4, 4096), (4097, 24)):
        x = torch.randn(3, 5, columns).bfloat16()
        x_q, x_scale = quantize_int8(x)
        for backend in backends():
            weight, rows = prepared(out, columns, "6:8", backend)
            ternary = weight.unpack().cpu()
            expected = ternary_matmul(x_q, x_scale, ternary, rows, None, torch.bfloat16)
            assert_equal(ternary_linear(x.cuda(), weight), expected)


def gated_mlp(x: torch.Tensor, gate_up: TernaryWeight, down: TernaryWeight) -> torch.Tensor:
    y_q, y_scale = quantize_fused(ternary_linear(x, gate_up), swiglu=True)
    return integer_linear(y_q, y_scale, down, None, x.dtype)


@pytest.mark.parametrize("tokens", [1, 40, 300])
def test_compiles_in_one_graph_and_in_a_cuda_graph(tokens: int) -> None:
    weight, _ = prepared(512, 1024, "6:8")
    x = torch.randn(tokens, 1024, device="cuda").bfloat16()
    eager = ternary_linear(x, weight)
    compiled = torch.compile(lambda x: torch.relu(ternary_linear(x, weight)), fullgraph=True)
    torch.testing.assert_close(compiled(x), torch.relu(eager), rtol=2 * BF16_STEP, atol=0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ternary_linear(x, weight)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, ternary_linear(x, weight))


@pytest.mark.parametrize("dynamic", [None, True])
def test_one_compiled_function_serves_all_token_counts(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    counters.clear()
    gate_up, _ = prepared(2 * 768, 1024, "6:8")
    down, _ = prepared(1024, 768, "6:8")
    linear = torch.compile(lambda x: ternary_linear(x, gate_up), fullgraph=True, dynamic=dynamic)
    mlp = torch.compile(lambda x: gated_mlp(x, gate_up, down), fullgraph=True, dynamic=dynamic)
    for tokens in (40, 300, 2, 33, 1000, 17, 64, 5):
        x = torch.randn(tokens, 1024, device="cuda").bfloat16()
        for compiled, eager in (
            (linear(x), ternary_linear(x, gate_up)),
            (mlp(x), gated_mlp(x, gate_up, down)),
        ):
            assert torch.equal(compiled, eager)
    assert counters["stats"]["unique_graphs"] <= (2 if dynamic else 4)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 2**35, reason="needs 32 GiB"
)
def test_more_elements_than_int32_counts() -> None:
    tokens, wide, narrow, last = 2**17 + 3, 2**14, 64, slice(-3, None)
    x = torch.zeros(tokens, wide, dtype=torch.bfloat16, device="cuda")
    x[last] = torch.randn(3, wide)
    expected, step = quantize_int8(x[last].cpu())
    quantized, scale = quantize_fused(x)
    assert_equal(quantized[last], expected)
    assert_equal(scale[last], step)
    del x, quantized
    x_q = torch.randint(-127, 128, (tokens, narrow), dtype=torch.int8, device="cuda")
    x_scale, w_scale = torch.rand(tokens, 1, device="cuda"), torch.rand(wide, device="cuda")
    weight = torch.randint(-1, 2, (wide, narrow), dtype=torch.int8, device="cuda")
    y = matmul_anywhere(x_q, x_scale, weight, w_scale, None, torch.bfloat16)
    few, steps = x_q[last].cpu(), x_scale[last].cpu()
    expected = ternary_matmul(few, steps, weight.cpu(), w_scale.cpu(), None, torch.bfloat16)
    assert_equal(y[last], expected)
