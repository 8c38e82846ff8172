"""int8 activations × ternary weights, scaled once.

Packed weights, experts' too, are multiplied by the backends of
:mod:`sparse_bitnet.kernels.registry`, whose files register themselves when imported here.
Weights that change at every step of training are int8 on a CPU and two bits on a GPU:
:func:`ternary_matmul`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bitnet.formats import two_bit
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
    "unpacked",
]


def ternary_matmul(
    x_q: Tensor,
    x_scale: Tensor,
    ternary: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Y = (Xq @ Tᵀ) · x_scale · w_scale + bias; arguments and results of the reference.

    On CUDA the two-bit product on Hopper and a Triton kernel elsewhere, on a CPU the compiled
    kernel for few tokens, the reference for the rest. All give the same values.

    Args:
        ternary: int8 ``[out, in]``, or uint8 of ``formats.two_bit``.
    """
    if runs_triton(x_q):
        return torch.ops.sparse_bitnet.dense_matmul(x_q, x_scale, ternary, w_scale, bias, out_dtype)
    ternary = unpacked(ternary, x_q.shape[-1])
    if cpu.serves_bytes(x_q, ternary):
        return cpu.linear(x_q, ternary, "bytes", w_scale, bias, out_dtype, x_scale)
    return reference.ternary_matmul(x_q, x_scale, ternary, w_scale, bias, out_dtype)


def byte_matmul(x_q: Tensor, x_scale: Tensor, weight: Tensor, w_scale: Tensor) -> Tensor:
    """The same of any int8 weight, on CUDA; float32."""
    y: Tensor = torch.ops.sparse_bitnet.dense_matmul(
        x_q, x_scale, weight, w_scale, None, torch.float32
    )
    return y


def unpacked(ternary: Tensor, columns: int) -> Tensor:
    """int8 ``[out, columns]`` of a weight that :func:`ternary_matmul` takes."""
    if ternary.dtype == torch.int8:
        return ternary
    # A compiler joins the formula with what reads the weight.
    if torch.compiler.is_compiling() or columns % two_bit.PER_BYTE or not runs_triton(ternary):
        return two_bit.unpack_rows(ternary, columns)
    from sparse_bitnet.kernels.matmul import triton_tiles

    with torch.cuda.device_of(ternary):
        return triton_tiles.unpack(ternary.contiguous())


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
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    from sparse_bitnet.kernels.matmul import triton_dense, triton_tiles

    rows, scale = _rows(x_q, x_scale)
    if _takes_tiles(rows, weight):
        y = hopper.matmul(
            rows,
            scale,
            triton_tiles.pack(weight.contiguous(), rows.shape[1]),
            w_scale.contiguous(),
            hopper.readable(bias),
            out_dtype,
            dependent=False,  # the kernel ahead writes the weight
        )
    else:
        ternary = unpacked(weight, rows.shape[1]).contiguous()
        y = triton_dense.matmul(
            rows, scale, ternary, w_scale.contiguous(), _in_row(bias), out_dtype
        )
    return y.view(*x_q.shape[:-1], weight.shape[0])


def _takes_tiles(rows: Tensor, weight: Tensor) -> bool:
    """Whether the two-bit product serves a weight of two bits, once in its order."""
    return (
        weight.dtype == torch.uint8
        and 0 < rows.shape[1] < hopper.LONGEST_ROW
        and BACKENDS["hopper"].serves(rows.device)
    )


def _fake_matmul(
    x_q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return x_q.new_empty((*x_q.shape[:-1], w_scale.shape[0]), dtype=out_dtype)


register(
    "dense_matmul(Tensor x_q, Tensor x_scale, Tensor weight, Tensor w_scale, Tensor? bias, "
    "ScalarType out_dtype) -> Tensor",
    _dense,
    _fake_matmul,
)
