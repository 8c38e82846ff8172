"""The attention kernel of generating steps on a GPU."""

from __future__ import annotations

import pytest
import torch

from sparse_bitnet.kernels.decode_attention import decode_attention, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "heads", "key_heads", "length", "width"),
    [(1, 28, 4, 576, 128), (32, 16, 2, 1000, 128), (3, 7, 7, 65, 64), (1, 32, 8, 20000, 128)],
)
@pytest.mark.parametrize("masked", [False, True])
def test_equals_pytorch(
    batch: int,
    heads: int,
    key_heads: int,
    length: int,
    width: int,
    dtype: torch.dtype,
    masked: bool,
) -> None:
    torch.manual_seed(0)
    query = torch.randn(batch, heads, 1, width, device="cuda").to(dtype)
    keys, values = torch.randn(2, batch, key_heads, length, width, device="cuda").to(dtype)
    seen = (
        (torch.arange(length, device="cuda") <= length // 2).view(1, 1, 1, -1) if masked else None
    )
    found = decode_attention(query, keys, values, seen, width**-0.5)
    inputs = (query.double(), keys.double(), values.double())
    expected = reference.decode_attention(*inputs, seen, width**-0.5)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_in_a_graph_and_compiled() -> None:
    query = torch.randn(1, 8, 1, 64, device="cuda").bfloat16()
    keys, values = torch.randn(2, 1, 2, 300, 64, device="cuda").bfloat16()
    eager = decode_attention(query, keys, values, None, 0.125)
    compiled = torch.compile(decode_attention, fullgraph=True)
    assert torch.equal(compiled(query, keys, values, None, 0.125), eager)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode_attention(query, keys, values, None, 0.125)
    graph.replay()
    assert torch.equal(captured, eager)
