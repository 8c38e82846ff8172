"""A gated MLP as one function on a GPU: its kernels equal the reference, it equals its layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from sparse_bitnet.core import Method
from sparse_bitnet.kernels.backward.reference import FP8
from sparse_bitnet.kernels.compiled import INDUCTOR_OPTIONS
from sparse_bitnet.kernels.swiglu import reference
from sparse_bitnet.nn import convert
from sparse_bitnet.nn.gated_mlp import GatedMLP, GatedProducts, join_gated_mlps

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
TOKENS, HIDDEN = 256, 512
BF16_STEP = 2.0**-7  # to the next number, at most
SHAPES = [(0, 64), (1, 1), (5, 100), (37, 4864), (64, 8960), (64, 11008), (9, 18944), (3, 40000)]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


def inputs(*shape: int) -> tuple[Tensor, Tensor]:
    gate, up = torch.randn(2, *shape, device="cuda") * 2
    return gate.bfloat16(), up.bfloat16()


@pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 2048)])
def test_quantize(shape: tuple[int, ...]) -> None:
    gate, up = inputs(*shape)
    quantized, scale = torch.ops.sparse_bitnet.swiglu_quantize(gate, up)
    expected, step = reference.quantize(gate, up)
    # An exponential that differs in its last bit may fall to the next bf16.
    torch.testing.assert_close(scale, step, rtol=BF16_STEP, atol=0)
    difference = (quantized.int() - expected.int()).abs()
    assert not (difference > 1).any()
    assert int((difference > 0).sum()) <= 0.02 * difference.numel()


@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_gradients(shape: tuple[int, int]) -> None:
    gate, up = inputs(*shape)
    dh, _ = inputs(*shape)
    factor = torch.rand(shape[0], device="cuda") * 1e-3
    ours = torch.ops.sparse_bitnet.swiglu_fp8_gradients(dh, factor, gate, up)
    expected = reference.fp8_gradients(dh, factor, gate, up)
    for values, scale, theirs, their_scale in (
        (*ours[:2], *expected[:2]),
        (*ours[2:], *expected[2:]),
    ):
        assert values.dtype == FP8
        assert torch.equal(scale, their_scale)
        a, b = values.float(), theirs.float()
        # A step of e4m3 where float32 differs in its last bits at a tie, which is rare.
        assert ((a - b).abs() <= b.abs() / 8 + 2**-9).all()
        assert int((a != b).sum()) <= 1e-3 * a.numel()


def test_edges() -> None:
    gate, up = inputs(6, 5000)
    dh, _ = inputs(6, 5000)
    dh[0] = 0
    gate[1], gate[2] = 300.0, -300.0
    dh[3, 5], gate[4, 5], up[5, 5] = torch.nan, torch.inf, torch.inf
    factor = torch.ones(6, device="cuda")
    ours = torch.ops.sparse_bitnet.swiglu_fp8_gradients(dh, factor, gate, up)
    expected = reference.fp8_gradients(dh, factor, gate, up)
    for mine, theirs in zip(ours[1::2], expected[1::2], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
    assert ours[1][3].isnan()
    assert ours[3][3].isnan()
    for mine, theirs in zip(ours[::2], expected[::2], strict=True):
        assert torch.allclose(mine[:3].float(), theirs[:3].float(), rtol=1 / 8, atol=2**-9)
    _, scale = torch.ops.sparse_bitnet.swiglu_quantize(gate, up)
    assert scale[:4].isfinite().all()
    assert not scale[4:].isfinite().any()


class Block(nn.Module):
    def __init__(self, inner: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN)
        self.mlp: nn.Module = LlamaMLP(LlamaConfig(hidden_size=HIDDEN, intermediate_size=inner))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.mlp(self.norm(x))
        return result


def step(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    inside = x.clone().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        y = module(inside)
    y.backward(dy)
    assert inside.grad is not None
    results = [y.detach() - x, inside.grad - dy]
    results += [p.grad.clone() for p in module.parameters() if p.grad is not None]
    module.zero_grad()
    return results


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("tokens", [TOKENS, 19])
@pytest.mark.parametrize("inner", [1536, 11008])
@pytest.mark.parametrize("backward", ["full", "fp8"])
def test_equals_its_layers(
    backward: Any, inner: int, tokens: int, compiled: bool, monkeypatch: Any
) -> None:
    plain = Block(inner).cuda()
    convert(plain, "6:8", method=Method(backward=backward))
    joined = copy.deepcopy(plain)
    join_gated_mlps(joined)
    assert isinstance(joined.mlp, GatedMLP)
    plain.mlp.gate_proj.register_forward_hook(lambda *_: None)  # so they run one by one
    used = []
    real = GatedProducts.apply
    if compiled:
        joined.compile(fullgraph=True, options=dict(INDUCTOR_OPTIONS))
    else:
        monkeypatch.setattr(GatedProducts, "apply", lambda *a: (used.append(1), real(*a))[1])
    x = torch.randn(tokens, HIDDEN, device="cuda")
    dy = torch.randn(tokens, HIDDEN, device="cuda")
    expected, ours = step(plain, x, dy), step(joined, x, dy)
    assert compiled or used
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.shape == theirs.shape
        # Roundings to bf16 that are skipped move values to other integers and e4m3 numbers.
        assert (mine - theirs).norm() < (6e-2 if backward == "fp8" else 2e-2) * theirs.norm()
