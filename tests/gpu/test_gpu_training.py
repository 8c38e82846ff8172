"""Training on a GPU: compiled and eager agree, replayed graphs see new weights."""

import pytest
import torch
from torch import nn

from sparse_bitnet.core import Method, Pattern, quantize_int8
from sparse_bitnet.kernels import quantize_activations
from sparse_bitnet.kernels.compiled import INDUCTOR_OPTIONS
from sparse_bitnet.nn import SparseBitLinear, convert
from sparse_bitnet.nn.pack import derived_ternary, pack_module

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
OUT, IN, TOKENS = 1536, 1920, 256


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


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


def test_a_weight_derived_in_two_bits_is_packed() -> None:
    layer = SparseBitLinear(nn.Linear(64, 24), Pattern(6, 8))
    ternary, scale = derived_ternary(layer)["weight"]
    found, gamma = derived_ternary(layer.cuda())["weight"]
    assert layer.derived()[0].dtype == torch.uint8
    assert torch.equal(found.cpu(), ternary)
    assert torch.equal(gamma.cpu(), scale)
    assert torch.equal(pack_module(layer, "two-bit", "layer").unpack("weight").cpu(), ternary)
