"""int8 activations × ternary weights, scaled once."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bitnet.core.errors import BackendError
from sparse_bitnet.kernels.library import register
from sparse_bitnet.kernels.matmul import cpu, reference
from sparse_bitnet.kernels.matmul.reference import integer_matmul
from sparse_bitnet.kernels.platform import runs_triton

__all__ = ["integer_matmul", "packed_matmul", "structured_matmul", "ternary_matmul"]


def ternary_matmul(
    x_q: Tensor,
    x_scale: Tensor,
    ternary: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Y = (Xq @ Tᵀ) · x_scale · w_scale + bias; arguments and results of the reference.

    One Triton kernel on CUDA, the CPU kernel for few tokens, the reference elsewhere. All give the
    same values; the first two serve any int8 weight.
    """
    if not runs_triton(x_q):
        if cpu.serves_bytes(x_q, ternary):
            return cpu.linear(x_q, ternary, "bytes", w_scale, bias, out_dtype, x_scale)
        return reference.ternary_matmul(x_q, x_scale, ternary, w_scale, bias, out_dtype)
    return torch.ops.sparse_bitnet.dense_matmul(x_q, x_scale, ternary, w_scale, bias, out_dtype)


def packed_matmul(
    x_q: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    residual: Tensor | None = None,
) -> Tensor:
    """The same for few tokens, from two-bit rows: uint8 of ``triton_packed.pack_rows``. CUDA.

    ``residual`` (``[..., out]`` of ``out_dtype``) is added to the result, which is rounded first.

    Raises:
        BackendError: for a residual of another shape or dtype.
    """
    shape = (*x_q.shape[:-1], packed.shape[0])
    if residual is not None and (residual.shape != shape or residual.dtype != out_dtype):
        raise BackendError(
            f"residual: {tuple(residual.shape)} of {residual.dtype}, but it is added to a result "
            f"{tuple(shape)} of {out_dtype}; give it that shape and dtype"
        )
    return torch.ops.sparse_bitnet.packed_matmul(
        x_q, x_scale, packed, w_scale, bias, out_dtype, residual
    )


def packed_swiglu(
    x_q: Tensor, x_scale: Tensor, packed: Tensor, w_scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The first half of a gated MLP of one or two tokens: quantized silu(gate)·up. CUDA.

    Args:
        x_q, x_scale: as of :func:`ternary_matmul`.
        packed, w_scale: of gate's rows before those of up.
        dtype: what separate modules would round to in between.

    Returns:
        int8 ``[..., inner]`` and float32 ``[..., 1]``.
    """
    values, scale = torch.ops.sparse_bitnet.packed_swiglu(x_q, x_scale, packed, w_scale, dtype)
    return values, scale


def structured_matmul(
    x_q: Tensor,
    x_scale: Tensor | None,
    compressed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """The same in bf16 on sparse tensor cores, from ``cusparselt.compress``. CUDA.

    The library rounds to bf16 before the token scale, which it cannot apply, so a result carries
    two roundings. Without ``x_scale`` it is left to the caller (``quantize_fused`` takes it as
    ``factor``); inside ``torch.compile`` it becomes part of whatever kernel reads Y.
    """
    if x_scale is not None and torch.compiler.is_compiling():
        y = torch.ops.sparse_bitnet.structured_matmul(x_q, None, compressed, w_scale, None)
        y = y.float() * x_scale
        return (y if bias is None else y + bias.float()).to(torch.bfloat16)
    return torch.ops.sparse_bitnet.structured_matmul(x_q, x_scale, compressed, w_scale, bias)


def _rows(x_q: Tensor, x_scale: Tensor) -> tuple[Tensor, Tensor]:
    rows = x_q.reshape(-1, x_q.shape[-1]).contiguous()
    if rows.storage_offset() % 4:  # one kernel reads words
        rows = rows.clone()
    return rows, x_scale.reshape(-1).contiguous()


def _in_row(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def _after_copies(rows: Tensor, *copied: bool) -> Tensor:
    """X for a kernel that reads scales and biases before the kernel ahead of it has ended.

    That one must not be the copy of a scale or bias, so then a copy of X goes in between.
    """
    return rows.clone() if any(copied) else rows


def _dense(
    x_q: Tensor,
    x_scale: Tensor,
    ternary: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    from sparse_bitnet.kernels.matmul import triton_dense

    rows, scale = _rows(x_q, x_scale)
    y = triton_dense.matmul(
        rows, scale, ternary.contiguous(), w_scale.contiguous(), _in_row(bias), out_dtype
    )
    return y.view(*x_q.shape[:-1], ternary.shape[0])


def _packed(
    x_q: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    residual: Tensor | None,
) -> Tensor:
    from sparse_bitnet.kernels.matmul import triton_packed

    rows, scale = _rows(x_q, x_scale)
    gammas, offsets = w_scale.contiguous(), _in_row(bias)
    added = _in_row(residual)
    rows = _after_copies(rows, gammas is not w_scale, offsets is not bias)
    y = triton_packed.matmul(rows, scale, packed, gammas, offsets, out_dtype, added)
    return y.view(*x_q.shape[:-1], packed.shape[0])


def _packed_swiglu(
    x_q: Tensor, x_scale: Tensor, packed: Tensor, w_scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    from sparse_bitnet.kernels.matmul import triton_swiglu

    rows, scale = _rows(x_q, x_scale)
    gammas = w_scale.contiguous()
    rows = _after_copies(rows, gammas is not w_scale)
    values, scale = triton_swiglu.swiglu_rows(rows, scale, packed, gammas, dtype)
    leading = x_q.shape[:-1]
    return values.view(*leading, -1), scale.view(*leading, 1)


def _fake_packed_swiglu(
    x_q: Tensor, x_scale: Tensor, packed: Tensor, w_scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    leading = x_q.shape[:-1]
    return (
        x_q.new_empty((*leading, w_scale.shape[0] // 2)),
        x_q.new_empty((*leading, 1), dtype=torch.float32),
    )


def _fake_matmul(
    x_q: Tensor,
    x_scale: Tensor,
    ternary: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    residual: Tensor | None = None,
) -> Tensor:
    return x_q.new_empty((*x_q.shape[:-1], w_scale.shape[0]), dtype=out_dtype)


def _structured(
    x_q: Tensor,
    x_scale: Tensor | None,
    compressed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    from sparse_bitnet.kernels.matmul import cusparselt, triton_finish

    y = cusparselt.matmul(x_q.reshape(-1, x_q.shape[-1]), compressed, w_scale.contiguous())
    if x_scale is not None:
        triton_finish.finish(y, x_scale.reshape(-1).contiguous(), _in_row(bias))
    return y.view(*x_q.shape[:-1], w_scale.shape[0])


def _fake_structured(
    x_q: Tensor,
    x_scale: Tensor | None,
    compressed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    return x_q.new_empty((*x_q.shape[:-1], w_scale.shape[0]), dtype=torch.bfloat16)


register(
    "dense_matmul(Tensor x_q, Tensor x_scale, Tensor weight, Tensor w_scale, Tensor? bias, "
    "ScalarType out_dtype) -> Tensor",
    _dense,
    _fake_matmul,
)
register(
    "packed_matmul(Tensor x_q, Tensor x_scale, Tensor weight, Tensor w_scale, Tensor? bias, "
    "ScalarType out_dtype, Tensor? residual) -> Tensor",
    _packed,
    _fake_matmul,
)
register(
    "structured_matmul(Tensor x_q, Tensor? x_scale, Tensor compressed, Tensor w_scale, "
    "Tensor? bias) -> Tensor",
    _structured,
    _fake_structured,
)
register(
    "packed_swiglu(Tensor x_q, Tensor x_scale, Tensor packed, Tensor w_scale, ScalarType dtype) "
    "-> (Tensor, Tensor)",
    _packed_swiglu,
    _fake_packed_swiglu,
)
