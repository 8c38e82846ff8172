"""Training on sparse tensor cores: the layout is exact, the layer equals the dense one."""

import pytest
import torch
from torch import Tensor

from sparse_bitnet.core import Method, Pattern, quantize_int8, ternarize
from sparse_bitnet.formats.windows import encode, group_for, lift
from sparse_bitnet.kernels import autotune, quantize_activations, training
from sparse_bitnet.kernels.compiled import INDUCTOR_OPTIONS
from sparse_bitnet.kernels.matmul import cusparselt
from sparse_bitnet.kernels.quantize_activations import quantize_with_lifted
from sparse_bitnet.kernels.ternarize import triton_windows
from sparse_bitnet.nn import SparseBitLinear, choose_products, convert, use_products

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
OUT, IN, TOKENS = 1536, 1920, 256
BF16_STEP = 2.0**-8


@pytest.fixture(autouse=True)
def _fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = autotune.Memory(None)
    monkeypatch.setattr(autotune, "memory", lambda index: memory)
    torch.manual_seed(0)


def layer(pattern: str, bias: bool = True) -> SparseBitLinear:
    torch.manual_seed(1)
    linear = torch.nn.Linear(IN, OUT, bias=bias, device="cuda")
    return SparseBitLinear(linear, Pattern.parse(pattern))


def step(module: SparseBitLinear, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.detach().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        y = module(x)
    y.backward(dy)
    assert x.grad is not None
    assert module.weight.grad is not None
    grads = (y.detach(), x.grad, module.weight.grad)
    module.zero_grad()
    return grads


@pytest.mark.parametrize("pattern", ["6:8", "4:6", "8:10", "7:8", "4:8", "3:4"])
def test_encode(pattern: str) -> None:
    parsed = Pattern.parse(pattern)
    ternary, _ = ternarize(torch.randn(33, 1920), parsed)
    group = group_for(parsed, 1920)
    assert group is not None
    ours = triton_windows.encode(ternary.cuda(), group)
    assert torch.equal(ours.cpu(), encode(ternary, group))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("columns", "group"), [(2048, 8), (11008, 8), (1920, 6), (1920, 10)])
def test_both_forms_of_the_activations(columns: int, group: int, dtype: torch.dtype) -> None:
    x = torch.randn(5, 7, columns, device="cuda").to(dtype)
    plain, lifted, scale = quantize_with_lifted(x, group)
    expected, expected_scale = quantize_activations(x)
    assert torch.equal(plain, expected)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(lifted, lift(expected, group))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("pattern", ["6:8", "2:4", "2:8", "4:6"])
def test_layer(pattern: str, bias: bool, compiled: bool) -> None:
    if cusparselt.version(0) < cusparselt.OLDEST_VERSION:
        pytest.skip("needs cuSPARSELt")
    module = layer(pattern, bias)
    x = torch.randn(4, TOKENS // 4, IN, device="cuda")
    dy = torch.randn(4, TOKENS // 4, OUT, device="cuda", dtype=torch.bfloat16)
    y, dx, dw = step(module, x, dy)
    module.use("sparse")
    assert module.group is not None
    if compiled:
        module.compile(fullgraph=True)
    ours = step(module, x, dy)
    # The library rounds the product to bf16 before the bias is added, which may cancel it.
    product = y.abs() + (0 if module.bias is None else module.bias.detach().abs())
    largest = y.abs().max()
    bound = 2 * BF16_STEP * product + BF16_STEP**2 * largest
    if compiled:  # a tie may fall to the other side, which moves a token's results by one step
        bound = bound + 1.01 * x.abs().amax(-1, keepdim=True) / 127 * module.derived()[1]
    assert ((ours[0] - y).abs() <= bound).all()
    # The same integers, but for ties, are kept for backward.
    torch.testing.assert_close(ours[1], dx, rtol=2e-2, atol=2e-2 * float(dx.abs().max()))
    assert (ours[2] - dw).norm() < 1e-3 * dw.norm()


@pytest.mark.parametrize("columns", [2048, 4096])
def test_compiled_quantization_gives_the_same_integers(columns: int) -> None:
    x = (
        torch.randn(256, columns, device="cuda")
        * torch.logspace(-8, 8, 256, device="cuda")[:, None]
    )
    x[3] = 0
    quantized, scale = torch.compile(quantize_int8, fullgraph=True)(x)
    expected, expected_scale = quantize_activations(x)
    # 1/127 is multiplied by, and a compiled division is good to two units in the last place.
    torch.testing.assert_close(scale, expected_scale, rtol=2**-21, atol=0)
    different = quantized != expected
    assert different.float().mean() < 1e-4
    assert ((quantized.int() - expected.int()).abs() <= 1).all()
    x[4, 7] = float("nan")
    _, scale = torch.compile(quantize_int8, fullgraph=True)(x)
    assert scale[4].isnan()  # what diverged must not come out healthy
    assert scale[5:].isfinite().all()


@pytest.mark.parametrize("backward", ["full", "fp8"])
def test_compiled_block_trains_as_in_eager_mode(backward: str) -> None:
    torch._dynamo.reset()  # other tests compiled the same code for other shapes
    torch.manual_seed(1)
    block = torch.nn.Sequential(
        torch.nn.RMSNorm(IN, device="cuda"),
        torch.nn.Linear(IN, OUT, bias=False, device="cuda"),
        torch.nn.SiLU(),
        torch.nn.Linear(OUT, IN, bias=False, device="cuda"),
    )
    convert(block, "6:8", method=Method(backward=backward))
    x = torch.randn(TOKENS, IN, device="cuda")
    dy = torch.randn(TOKENS, IN, device="cuda", dtype=torch.bfloat16)
    results = []
    for compiled in (False, True):
        if compiled:
            block.compile(fullgraph=True, options=dict(INDUCTOR_OPTIONS))
        inside = x.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            y = block(inside)
        y.backward(dy)
        grads = [inside.grad, *(p.grad for p in block.parameters())]
        results.append([y.detach(), *(g.clone() for g in grads)])
        block.zero_grad()
    for eager, ours in zip(*results, strict=True):
        # Roundings to bf16 that the compiler skips move values to other integers and e4m3 numbers.
        assert (ours - eager).norm() < (6e-2 if backward == "fp8" else 2e-2) * eager.norm()


def test_layout_follows_the_weight_and_the_pattern() -> None:
    module = layer("6:8")
    module.use("sparse")
    x = torch.randn(TOKENS, IN, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        before = module(x)
        module.weight.data.neg_()
        module.bias.data.neg_()
        assert torch.equal(module(x), -before)
    module.set_pattern(Pattern.parse("dense"))
    assert module.group is None
    module.set_pattern(Pattern.parse("2:4"))
    assert module.group == 0
    module.cpu()
    assert module.group is None


@pytest.mark.parametrize("kind", ["bitnet", "bf16"])
def test_a_replayed_graph_sees_new_weights(kind: str) -> None:
    """What CUDA records includes deriving, so a replay cannot have old weights."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(IN, OUT, bias=False, device="cuda"))
    convert(model, "6:8", kind=kind)  # type: ignore[arg-type]
    x = torch.randn(TOKENS, IN, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            model(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        for _ in range(3):
            model[0].weight.data.copy_(torch.randn_like(model[0].weight))
            graph.replay()
            assert torch.equal(y, model(x))


def test_float32_results_stay_dense_and_exact() -> None:
    module = layer("6:8")
    x = torch.randn(TOKENS, IN, device="cuda")
    expected = module(x)
    module.use("sparse")
    assert torch.equal(module(x), expected)


def test_choice_is_measured_and_the_faster_one() -> None:
    choice = training.choose(OUT, IN, Pattern(2, 4), 4096, torch.device("cuda", 0))
    times = choice.microseconds
    assert (choice.backend == "sparse") == (times["sparse"] + times["layout"] < times["dense"])
    model = torch.nn.Sequential(layer("2:4"), layer("dense"))
    products = choose_products(model, 4096)
    assert products == {"0": choice.backend, "1": "dense"}
    use_products(model, {"0": "sparse"})
    assert model[0].group is not None
