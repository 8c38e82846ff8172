"""int8 activations × ternary weights, scaled once.

Packed weights, experts' too, are multiplied by the backends of
:mod:`sparse_bitnet.kernels.registry`, whose files register themselves when imported here.
Weights that change at every step of training are int8: :func:`ternary_matmul`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bitnet.kernels.library import register
from sparse_bitnet.kernels.matmul import cpu, hopper, reference, triton_two_bit
from sparse_bitnet.kernels.matmul.reference import integer_matmul
from sparse_bitnet.kernels.platform import runs_triton
from sparse_bitnet.kernels.registry import BACKENDS

__all__ = [
    "byte_matmul",
    "cpu",
    "hopper",
    "integer_matmul",
    "reference",
    "ternary_matmul",
    "triton_two_bit",
]


FEWEST_FOR_TILES = 512  # tokens


def ternary_matmul(
    x_q: Tensor,
    x_scale: Tensor,
    ternary: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Y = (Xq @ Tᵀ) · x_scale · w_scale + bias; arguments and results of the reference.

    On CUDA the two-bit product of many tokens on Hopper and a Triton kernel for the rest, on a CPU
    the compiled kernel for few tokens, the reference elsewhere. All give the same values.
    """
    if not runs_triton(x_q):
        if cpu.serves_bytes(x_q, ternary):
            return cpu.linear(x_q, ternary, "bytes", w_scale, bias, out_dtype, x_scale)
        return reference.ternary_matmul(x_q, x_scale, ternary, w_scale, bias, out_dtype)
    return torch.ops.sparse_bitnet.dense_matmul(
        x_q, x_scale, ternary, w_scale, bias, out_dtype, True
    )


def byte_matmul(x_q: Tensor, x_scale: Tensor, weight: Tensor, w_scale: Tensor) -> Tensor:
    """The same of any int8 weight, on CUDA; float32."""
    y: Tensor = torch.ops.sparse_bitnet.dense_matmul(
        x_q, x_scale, weight, w_scale, None, torch.float32, False
    )
    return y


def _rows(x_q: Tensor, x_scale: Tensor) -> tuple[Tensor, Tensor]:
    rows = x_q.reshape(-1, x_q.shape[-1]).contiguous()
    if rows.storage_offset() % 4:  # one kernel reads words
        rows = rows.clone()
    return rows, x_scale.reshape(-1).contiguous()


def _in_row(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def _dense(
    x_q: Tensor,
    x_scale: Tensor,
    ternary: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    is_ternary: bool,
) -> Tensor:
    from sparse_bitnet.kernels.matmul import triton_dense, triton_tiles

    rows, scale = _rows(x_q, x_scale)
    if is_ternary and _takes_tiles(rows, ternary):
        packed = triton_tiles.pack(ternary.contiguous())
        y = hopper.matmul(
            rows,
            scale,
            packed,
            w_scale.contiguous(),
            hopper.readable(bias),
            out_dtype,
            dependent=False,  # the kernel ahead writes the weight
        )
        return y.view(*x_q.shape[:-1], ternary.shape[0])
    y = triton_dense.matmul(
        rows, scale, ternary.contiguous(), w_scale.contiguous(), _in_row(bias), out_dtype
    )
    return y.view(*x_q.shape[:-1], ternary.shape[0])


def _takes_tiles(rows: Tensor, ternary: Tensor) -> bool:
    """Whether the two-bit product pays for making the tile order first."""
    return (
        rows.shape[0] >= FEWEST_FOR_TILES
        and ternary.shape[1] % 4 == 0
        and ternary.data_ptr() % 4 == 0
        and 0 < ternary.shape[1] < hopper.LONGEST_ROW
        and BACKENDS["hopper"].serves(rows.device)
    )


def _fake_matmul(
    x_q: Tensor,
    x_scale: Tensor,
    ternary: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    is_ternary: bool,
) -> Tensor:
    return x_q.new_empty((*x_q.shape[:-1], w_scale.shape[0]), dtype=out_dtype)


register(
    "dense_matmul(Tensor x_q, Tensor x_scale, Tensor weight, Tensor w_scale, Tensor? bias, "
    "ScalarType out_dtype, bool is_ternary) -> Tensor",
    _dense,
    _fake_matmul,
)
