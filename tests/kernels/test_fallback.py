"""Without CUDA every operation is the reference, under the public names."""

import torch

from sparse_bitnet.core import quantize_int8
from sparse_bitnet.kernels.quantize_activations import quantize_fused


def test_fused_quantization_is_its_parts():
    x = torch.randn(4, 32).bfloat16()
    weight = torch.rand(32).bfloat16()
    norm = torch.nn.RMSNorm(32, eps=1e-6)
    quantized, scale = quantize_fused(x.float(), weight.float(), 1e-6)
    expected, step = quantize_int8(norm(x.float()) * weight.float())
    torch.testing.assert_close(scale, step)
    assert (quantized.int() - expected.int()).abs().max() <= 1
    gate, up = x.chunk(2, dim=-1)
    quantized, scale = quantize_fused(x, swiglu=True)
    expected, step = quantize_int8(torch.nn.functional.silu(gate) * up)
    assert torch.equal(quantized, expected)
    assert torch.equal(scale, step)


def test_operators_know_their_shapes():
    with torch.device("meta"):
        x, norm = torch.empty(2, 3, 64, dtype=torch.bfloat16), torch.empty(64)
        quantized, scale = torch.ops.sparse_bitnet.quantize_activations(x, norm, 0.0, False)
        assert (quantized.shape, quantized.dtype) == ((2, 3, 64), torch.int8)
        assert (scale.shape, scale.dtype) == ((2, 3, 1), torch.float32)
        quantized, _ = torch.ops.sparse_bitnet.quantize_activations(x, None, 0.0, True)
        assert quantized.shape == (2, 3, 32)
        ternary, gamma = torch.ops.sparse_bitnet.ternarize(
            torch.empty(4, 8, 16),
            torch.tensor([6, 8], device="cpu"),
            [5, 3],
            "quant-then-mask",
            "master",
        )
        assert (ternary.shape, ternary.dtype, gamma.shape) == ((4, 8, 16), torch.int8, (4, 2))
        x_q, weight = torch.empty(2, 3, 64, dtype=torch.int8), torch.empty(8, 64, dtype=torch.int8)
        y = torch.ops.sparse_bitnet.dense_matmul(x_q, scale, weight, norm[:8], None, torch.float16)
        assert (y.shape, y.dtype) == ((2, 3, 8), torch.float16)
