"""int8 × two-bit ternary on GPUs that have no kernel of their own: from Ampere (sm_80) on.

Layout. A row is cut into blocks of 64 weights, 16 bytes. Byte B of a block holds weights B, 16 + B,
32 + B and 48 + B in bit pairs 0, 1, 2 and 3, as two's complement (−1 = 11, 0 = 00, 1 = 01).
Shifting a pair to the top of its byte and masking the rest away gives 64·T as int8, four weights at
once and no bias to subtract; a plane of 16 bytes then meets 16 consecutive activations. Sums carry
the factor 64, which an arithmetic shift removes exactly; they fit int32 below 2¹⁸ input features.

Where tiles are too few to fill a GPU, K is cut into slices, and a second, small kernel
(``triton_two_bit_kernels.py``, with the first) adds their sums: they are integers, so the result
does not depend on the cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_bitnet.core.errors import BackendError
from sparse_bitnet.kernels.library import register
from sparse_bitnet.kernels.platform import serves_triton
from sparse_bitnet.kernels.registry import Backend, TernaryWeight, register_backend

BLOCK = 64
LONGEST_ROW = 2**18
FEW_ROWS = 8192


@dataclass(frozen=True)
class Tiles:
    """Tokens, rows and bytes of a row that a program holds at once; slices of a row; launch."""

    tokens: int
    rows: int
    bytes: int
    splits: int
    warps: int
    stages: int


def tiles_for(tokens: int, out: int) -> Tiles:
    """By rule: few tokens wait for memory, and few rows leave multiprocessors idle."""
    if tokens <= 16:
        return Tiles(16, 128, 64, 8, 4, 4) if out < FEW_ROWS else Tiles(16, 128, 128, 1, 8, 3)
    if tokens <= 32:
        return Tiles(32, 128, 128, 4, 8, 3) if out < FEW_ROWS else Tiles(32, 256, 64, 1, 8, 4)
    return Tiles(64, 128, 64, 1, 8, 3) if tokens <= 64 else Tiles(128, 128, 64, 1, 8, 3)


def pack_rows(ternary: Tensor) -> Tensor:
    """int8 ``[out, in]`` → uint8 ``[out, ceil(in/64)·16]`` in the layout above."""
    out, columns = ternary.shape
    pairs = F.pad(ternary, (0, -columns % BLOCK)).view(torch.uint8) & 3
    pairs = pairs.view(out, -1, 4, 16)
    packed = pairs[:, :, 0] | pairs[:, :, 1] << 2 | pairs[:, :, 2] << 4 | pairs[:, :, 3] << 6
    return packed.reshape(out, -1)


def unpack_rows(packed: Tensor, columns: int) -> Tensor:
    """The inverse of :func:`pack_rows`: int8 ``[out, columns]``."""
    blocks = packed.view(packed.shape[0], -1, 16)
    pairs = torch.stack([blocks >> shift & 3 for shift in (0, 2, 4, 6)], dim=2)
    ternary = (pairs ^ 2).view(torch.int8) - 2  # two's complement of two bits
    return ternary.reshape(packed.shape[0], -1)[:, :columns].contiguous()


def _matmul(
    x_q: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    from sparse_bitnet.kernels.matmul import triton_two_bit_kernels

    rows = x_q.reshape(-1, x_q.shape[-1]).contiguous()
    if rows.shape[1] >= LONGEST_ROW:
        raise BackendError(
            f"two-bit product: {rows.shape[1]} input features would leave int32 (the limit is "
            f"{LONGEST_ROW - 1})"
        )
    y = torch.empty((rows.shape[0], w_scale.shape[0]), dtype=out_dtype, device=rows.device)
    scale = x_scale.reshape(-1).contiguous()
    given = None if bias is None else bias.contiguous()
    tiles = tiles_for(*y.shape)
    gammas = w_scale.contiguous()
    triton_two_bit_kernels.run(rows, scale, packed, gammas, given, y, tiles)
    return y.view(*x_q.shape[:-1], w_scale.shape[0])


def _fake(
    x_q: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return x_q.new_empty((*x_q.shape[:-1], w_scale.shape[0]), dtype=out_dtype)


register(
    "triton_matmul(Tensor x_q, Tensor x_scale, Tensor packed, Tensor w_scale, Tensor? bias, "
    "ScalarType out_dtype) -> Tensor",
    _matmul,
    _fake,
)


class TritonTwoBit(Backend):
    """Two-bit rows on any NVIDIA GPU from sm_80 on."""

    name = "triton"
    rank = 1

    def serves(self, device: torch.device) -> bool:
        return device.type == "cuda" and serves_triton(device.index)

    def reason(self, device: torch.device) -> str:
        return "Triton kernels over two-bit rows"

    def pack(self, ternary: Tensor, stored: Tensor | None) -> tuple[Tensor, str]:
        return pack_rows(ternary), "rows"

    def unpack(self, weight: TernaryWeight) -> Tensor:
        return unpack_rows(weight.packed, weight.in_features)

    def multiply(
        self,
        x_q: Tensor,
        x_scale: Tensor,
        weight: TernaryWeight,
        bias: Tensor | None,
        out_dtype: torch.dtype,
        residual: Tensor | None,
    ) -> Tensor:
        y: Tensor = torch.ops.sparse_bitnet.triton_matmul(
            x_q, x_scale, weight.packed, weight.w_scale, bias, out_dtype
        )
        return y if residual is None else residual + y


register_backend(TritonTwoBit())
