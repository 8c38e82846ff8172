import pytest
import torch

from sparse_bitnet.core import BackendError
from sparse_bitnet.kernels import matmul
from sparse_bitnet.kernels.matmul import reference, triton_packed


@pytest.mark.parametrize("tokens", [1, 3])
def test_products(tokens: int) -> None:
    """Operands may begin anywhere and have any strides; every second lane is not to be read."""
    x_q = torch.randint(-128, 128, (tokens, 130), dtype=torch.int8)
    weight = torch.randint(-1, 2, (24, 130), dtype=torch.int8)
    x_scale, w_scale, bias = torch.rand(2 * tokens)[::2], torch.rand(48)[::2], torch.randn(48)[::2]
    x_scale = x_scale.unsqueeze(-1)
    for x, rows in ((x_q[:, 1:65], weight[:, 1:65]), (x_q[:, ::2], weight[:, ::2])):
        expected = reference.ternary_matmul(x, x_scale, rows, w_scale, bias)
        packed = triton_packed.pack_rows(rows)
        dense = matmul._dense(x, x_scale, rows, w_scale, bias, torch.float32)
        assert torch.equal(dense, expected)
        few = matmul._packed(x, x_scale, packed, w_scale, bias, torch.float32, None)
        assert torch.equal(few, expected)
        residual = torch.randn(24, tokens).t()
        few = matmul._packed(x, x_scale, packed, w_scale, bias, torch.float32, residual)
        assert torch.equal(few, residual + expected)


def test_a_residual_of_another_shape_or_dtype_is_refused() -> None:
    x_q, scale = torch.zeros(1, 3, 64, dtype=torch.int8), torch.ones(1, 3, 1)
    operands = (x_q, scale, torch.zeros(24, 16, dtype=torch.uint8), torch.ones(24), None)
    for residual in (torch.zeros(1, 3, 1), torch.zeros(1, 1, 24), torch.zeros(1, 3, 24).half()):
        with pytest.raises(BackendError, match=r"residual: .* added to a result \(1, 3, 24\)"):
            matmul.packed_matmul(*operands, torch.float32, residual)
