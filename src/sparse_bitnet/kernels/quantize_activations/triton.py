# ruff: noqa: RUF005  (Triton's language concatenates tuples, it does not unpack them)
# mypy: disable-error-code="no-untyped-def,assignment,var-annotated"
"""Activations → int8 in one pass over them, with what comes before and after fused in.

One program serves one token and holds its values in registers, so device memory is read once:
[residual sum] → [RMSNorm | SwiGLU product] → absmax → round → store.

Exactness. The magnitude is the maximum of the bit patterns of |x|, which order as the floats do
and, unlike a float maximum, let a NaN through: a diverged token must not come out as a healthy one.
Rounding adds 1.5·2²³, whose sum rounds half to even to an integer and leaves it in the low bits.
A fused multiply-add would skip the rounding of x·s that the reference makes, so contraction is off.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_bitnet.kernels import pdl
from sparse_bitnet.kernels.pdl import wait

SMALLEST_BITS = tl.constexpr(0x3727C5AC)  # 1e-5 as float32
ROUNDER = tl.constexpr(12582912.0)  # 1.5 · 2²³
ROUNDER_BITS = tl.constexpr(0x4B400000)
MOST_CHUNKS = 20
FEW_ROWS = 264  # two programs for each multiprocessor of an H100 or H200


@triton.jit
def _swiglu(gate, up):
    """silu(gate) · up, rounded where the unfused modules round."""
    silu = (gate.to(tl.float32) / (1.0 + tl.exp(-gate.to(tl.float32)))).to(gate.dtype)
    return (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)


@triton.jit
def _normed(x, weight, inverse_rms):
    """RMSNorm's last steps, rounded where the module rounds."""
    normed = (x.to(tl.float32) * inverse_rms).to(x.dtype)
    return (normed.to(tl.float32) * weight.to(tl.float32)).to(x.dtype)


@triton.jit
def magnitude_bits(x):
    """|x| as the bits of a float32, which order as magnitudes do and keep NaN the largest."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _rounded(value, inverse_step):
    return (value * inverse_step + ROUNDER).to(tl.int32, bitcast=True) - ROUNDER_BITS


@triton.jit
def _quantize_kernel(
    x_ptr,
    norm_ptr,
    q_ptr,
    delta_ptr,
    sum_ptr,
    scale_ptr,
    columns,
    x_stride,
    epsilon,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    NORM: tl.constexpr,
    SWIGLU: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    q_ptr += row * columns
    norm = ()
    if NORM and PDL:  # a weight, and so there before what is normed
        for i in tl.static_range(CHUNKS):
            lanes = i * CHUNK + tl.arange(0, CHUNK)
            norm = norm + (tl.load(norm_ptr + lanes, mask=lanes < columns, other=0.0),)
    wait(PDL)
    values = ()
    squares = tl.zeros((CHUNK,), tl.float32)
    for i in tl.static_range(CHUNKS):
        lanes = i * CHUNK + tl.arange(0, CHUNK)
        mask = lanes < columns
        x = tl.load(x_ptr + lanes, mask=mask, other=0.0)
        if ADD:
            delta = tl.load(delta_ptr + row * columns + lanes, mask=mask, other=0.0)
            x = (x.to(tl.float32) + delta.to(tl.float32)).to(x.dtype)
            tl.store(sum_ptr + row * columns + lanes, x, mask=mask)
        if SWIGLU:
            x = _swiglu(x, tl.load(x_ptr + columns + lanes, mask=mask, other=0.0))
        if NORM:
            squares += x.to(tl.float32) * x.to(tl.float32)
        values = values + (x,)
    if NORM:
        inverse_rms = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(squares) / columns + epsilon))
        normed = ()
        for i in tl.static_range(CHUNKS):
            if PDL:
                weight = norm[i]
            else:
                lanes = i * CHUNK + tl.arange(0, CHUNK)
                weight = tl.load(norm_ptr + lanes, mask=lanes < columns, other=0.0)
            normed = normed + (_normed(values[i], weight, inverse_rms),)
        values = normed
    largest = tl.full((CHUNK,), SMALLEST_BITS, tl.int32)
    for i in tl.static_range(CHUNKS):
        largest = tl.maximum(largest, magnitude_bits(values[i]))
    magnitude = tl.max(largest).to(tl.float32, bitcast=True)
    tl.store(scale_ptr + row, tl.div_rn(magnitude, 127.0))
    inverse_step = tl.div_rn(1.0, magnitude) * 127.0  # the reference's own two roundings
    for i in tl.static_range(CHUNKS):
        lanes = i * CHUNK + tl.arange(0, CHUNK)
        rounded = _rounded(values[i].to(tl.float32), inverse_step)
        tl.store(q_ptr + lanes, rounded.to(tl.int8), mask=lanes < columns)


def _shape(rows: int, columns: int, swiglu: bool) -> tuple[int, int]:
    """Chunk length and warps; measured on an H200, where more or fewer registers a row lose.

    Chunks are unrolled, so their number is kept small enough to compile in a few seconds. Few rows
    leave most multiprocessors idle, and the one that serves a long row wants all its threads.
    """
    power = triton.next_power_of_2(max(columns, 64))
    few = rows <= FEW_ROWS
    if few and not swiglu and power <= 8192:
        return power, max(1, power // 512)
    if not swiglu and power <= 4096:
        return power, 1 if power <= 1024 else 2
    chunk = min(power, 4096 if swiglu else 1024)
    while columns > MOST_CHUNKS * chunk:
        chunk *= 2
    return chunk, max(1, min(32 if few else 8, chunk // 128))


def quantize(
    x: Tensor,
    norm_weight: Tensor | None = None,
    epsilon: float = 0.0,
    swiglu: bool = False,
    delta: Tensor | None = None,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel; arguments and results as ``quantize_fused`` of this operation.

    With ``delta`` (contiguous, like ``x``), ``total`` receives x + delta, and that is quantized.
    """
    columns = x.shape[-1] // 2 if swiglu else x.shape[-1]
    quantized = torch.empty((*x.shape[:-1], columns), dtype=torch.int8, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    if scale.numel() == 0:
        return quantized, scale
    chunk, warps = _shape(rows.shape[0], columns, swiglu)
    norm = None if norm_weight is None else norm_weight.contiguous()
    # Of many short rows each program would wait for nothing, at twice the time. A norm's weight is
    # read before the wait, so it must not have been copied just now.
    use_pdl = rows.shape[0] <= FEW_ROWS and norm is norm_weight
    options = pdl.launch_options(x) if use_pdl else pdl.OFF
    _quantize_kernel[(rows.shape[0],)](
        rows,
        norm,
        quantized,
        delta,
        total,
        scale,
        columns,
        rows.stride(0),
        epsilon,
        CHUNK=chunk,
        CHUNKS=triton.cdiv(columns, chunk),
        NORM=norm_weight is not None,
        SWIGLU=swiglu,
        ADD=delta is not None,
        num_warps=warps,
        enable_fp_fusion=False,
        **options,
    )
    return quantized, scale
