"""Kernels under programmatic dependent launch give what plain launches give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparse_bitnet.core import Pattern, row_scale
from sparse_bitnet.kernels import pdl, ternarize
from sparse_bitnet.kernels.decode_attention import decode_attention
from sparse_bitnet.kernels.quantize_activations import quantize_fused
from sparse_bitnet.kernels.registry import (
    TernaryWeight,
    integer_linear,
    prepare,
    ternary_linear,
)

pytestmark = pytest.mark.gpu
WIDTH, INNER, LAYERS, HEADS, LENGTH = 512, 2048, 24, 4, 300


def weight(out: int, columns: int) -> TernaryWeight:
    ternary, scale = ternarize(torch.randn(out, columns, device="cuda"), Pattern.parse("6:8"))
    return prepare(ternary, row_scale(scale, (), out))


def gated_mlp(x: Tensor, gate_up: TernaryWeight, down: TernaryWeight) -> Tensor:
    y_q, y_scale = quantize_fused(ternary_linear(x, gate_up), swiglu=True)
    return integer_linear(y_q, y_scale, down, None, x.dtype)


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_a_chain_in_a_cuda_graph(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_capability() < pdl.OLDEST_CAPABILITY:
        pytest.skip("no programmatic dependent launch")
    torch.manual_seed(0)
    layers = [
        (weight(WIDTH, WIDTH), weight(2 * INNER, WIDTH), weight(WIDTH, INNER))
        for _ in range(LAYERS)
    ]
    shape = (tokens, HEADS, LENGTH, WIDTH // HEADS)
    keys, values = (torch.randn(shape, device="cuda").bfloat16() for _ in range(2))
    x = torch.randn(tokens, WIDTH, device="cuda").bfloat16()

    def token() -> Tensor:
        y = x
        for mixer, gate_up, down in layers:
            query = ternary_linear(y, mixer).view(tokens, HEADS, 1, -1)
            seen = decode_attention(query, keys, values, None, 0.1)
            y = torch.nn.functional.rms_norm(y + seen.reshape(tokens, WIDTH), (WIDTH,))
            y = torch.nn.functional.rms_norm(y + gated_mlp(y, gate_up, down), (WIDTH,))
        return y

    def captured() -> tuple[torch.cuda.CUDAGraph, Tensor]:
        token()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = token()
        return graph, y

    assert pdl.launch_options(x)["PDL"]
    graph, found = captured()
    with monkeypatch.context() as without:
        without.setattr(pdl, "launch_options", lambda _: {"PDL": False})
        reference, expected = captured()
    for _ in range(50):
        x.normal_()
        reference.replay()
        graph.replay()
        assert torch.equal(found, expected)
        assert found.isfinite().all()
