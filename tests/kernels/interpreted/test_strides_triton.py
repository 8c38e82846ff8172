import pytest
import torch

from sparse_bitnet.kernels import matmul
from sparse_bitnet.kernels.matmul import reference, triton_two_bit


@pytest.mark.parametrize("tokens", [1, 3])
def test_products(tokens: int) -> None:
    """Operands may begin anywhere and have any strides; every second lane is not to be read."""
    x_q = torch.randint(-128, 128, (tokens, 130), dtype=torch.int8)
    weight = torch.randint(-1, 2, (24, 130), dtype=torch.int8)
    x_scale, w_scale, bias = torch.rand(2 * tokens)[::2], torch.rand(48)[::2], torch.randn(48)[::2]
    x_scale = x_scale.unsqueeze(-1)
    for x, rows in ((x_q[:, 1:65], weight[:, 1:65]), (x_q[:, ::2], weight[:, ::2])):
        expected = reference.ternary_matmul(x, x_scale, rows, w_scale, bias)
        packed = triton_two_bit.pack_rows(rows)
        dense = matmul._dense(x, x_scale, rows, w_scale, bias, torch.float32)
        assert torch.equal(dense, expected)
        few = triton_two_bit._matmul(x, x_scale, packed, w_scale, bias, torch.float32)
        assert torch.equal(few, expected)
