"""int8 × ternary in exact integer arithmetic, then one scaling in float32.

PyTorch's own int8 product serves where it can. On x86 without VNNI it makes one operand unsigned by
adding 128, and adds products in pairs of 16 bits, which saturate at 2¹⁵ − 1. With a ternary weight
and |Xq| ≤ 127, as every quantization here gives, no pair gets there, whichever operand it is:
2·255·1 = 510 or 2·129·127 = 32,766. With any int8 weight pairs do: those products are in
``int8_linear``.

Its CUDA form wants more than 16 rows and inner and outer sizes that 8 divides, so operands are
padded with zeros, which changes no sum. Where there is no int8 product the operands go through
float32: a product of int8 and {−1, 0, 1} summed over fewer than 2¹⁷ lanes stays below 2²⁴, so every
partial sum is exact in any order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_bitnet.core.errors import WeightError
from sparse_bitnet.core.ternary import check_row
from sparse_bitnet.kernels import native
from sparse_bitnet.kernels.platform import OLDEST_CAPABILITY, capability, has_triton
from sparse_bitnet.kernels.registry import Backend, TernaryWeight, register_backend

LONGEST_EXACT_SUM = 2**17  # lanes of magnitude at most 128 that float32 sums exactly
CUDA_MULTIPLE = 8
CUDA_FEWEST_ROWS = 17


def integer_matmul(x_q: Tensor, ternary: Tensor) -> Tensor:
    """Xq @ Tᵀ, exact.

    Args:
        x_q: int8 ``[tokens, in]``, at least −127.
        ternary: int8 ``[out, in]`` with values in {−1, 0, 1}.

    Returns:
        int32 ``[tokens, out]``.

    Raises:
        WeightError: if ``in`` is too long for int32, or for exact sums on a device without an int8
            product.
    """
    check_row(x_q.shape[1])
    # With one input feature torch 2.13's int8 product on CPU returns garbage.
    if x_q.device.type == "cpu" and x_q.shape[1] > 1:
        return torch._int_mm(x_q, ternary.t())
    if x_q.device.type == "cuda":
        tokens, out = x_q.shape[0], ternary.shape[0]
        missing_rows = max(0, CUDA_FEWEST_ROWS - tokens)
        missing_in = -x_q.shape[1] % CUDA_MULTIPLE
        missing_out = -out % CUDA_MULTIPLE
        if missing_rows or missing_in:
            x_q = F.pad(x_q, (0, missing_in, 0, missing_rows))
        if missing_in or missing_out:
            ternary = F.pad(ternary, (0, missing_in, 0, missing_out))
        return torch._int_mm(x_q.contiguous(), ternary.contiguous().t())[:tokens, :out]
    if x_q.shape[1] >= LONGEST_EXACT_SUM:
        raise WeightError(
            f"matmul: {x_q.shape[1]} input features on device {x_q.device.type!r} cannot be summed "
            f"exactly in float32 (the limit is {LONGEST_EXACT_SUM - 1}); use CPU or CUDA"
        )
    return (x_q.float() @ ternary.float().t()).to(torch.int32)


def ternary_matmul(
    x_q: Tensor,
    x_scale: Tensor,
    ternary: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Y = (Xq @ Tᵀ) · x_scale · w_scale + bias, rounded to ``out_dtype`` once at the end.

    Args:
        x_q: int8 ``[..., in]``.
        x_scale: float32 ``[..., 1]``, one a token.
        ternary: int8 ``[out, in]``, values in {−1, 0, 1}.
        w_scale: float32 ``[out]``, one a row.
        bias: ``[out]`` or None.
        out_dtype: of the result.

    Returns:
        ``[..., out]``.
    """
    product = integer_matmul(x_q.reshape(-1, x_q.shape[-1]), ternary)
    # Shaped before it is scaled: a result that is no view may be changed in place by the caller.
    y = product.reshape(*x_q.shape[:-1], ternary.shape[0]).float().mul_(x_scale).mul_(w_scale)
    if bias is not None:
        y.add_(bias)
    return y.to(out_dtype)


class Reference(Backend):
    """int8 rows and plain PyTorch, on any device."""

    name = "reference"
    rank = 2

    def serves(self, device: torch.device) -> bool:
        return True

    def reason(self, device: torch.device) -> str:
        if device.type == "cpu":
            return native.explanation()
        if device.type != "cuda":
            return "plain PyTorch integer arithmetic"
        if not has_triton():
            return "Triton is not installed (pip install triton)"
        have = ".".join(map(str, capability(device.index)))
        need = ".".join(map(str, OLDEST_CAPABILITY))
        return f"compute capability {have} is below {need}"

    def pack(self, ternary: Tensor, stored: Tensor | None) -> tuple[Tensor, str]:
        return ternary, "int8"

    def unpack(self, weight: TernaryWeight) -> Tensor:
        return weight.packed

    def multiply(
        self,
        x_q: Tensor,
        x_scale: Tensor,
        weight: TernaryWeight,
        bias: Tensor | None,
        out_dtype: torch.dtype,
        residual: Tensor | None,
    ) -> Tensor:
        y = ternary_matmul(x_q, x_scale, weight.packed, weight.w_scale, bias, out_dtype)
        return y if residual is None else residual + y


register_backend(Reference())
