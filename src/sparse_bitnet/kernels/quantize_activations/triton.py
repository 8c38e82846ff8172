# ruff: noqa: RUF005  (Triton's language concatenates tuples, it does not unpack them)
# mypy: disable-error-code="no-untyped-def,assignment,var-annotated"
"""Activations → int8 in one pass over them, with what comes before and after fused in.

One program serves one token and holds its values in registers, so device memory is read once:
[token factor] → [RMSNorm | SwiGLU product] → absmax → round → [lift] → store. Lifting exchanges
rounded pairs of lanes between threads through shared memory and stores whole words, a window each.

Exactness. The magnitude is the maximum of the bit patterns of |x|, which order as the floats do
and, unlike a float maximum, let a NaN through: a diverged token must not come out as a healthy one.
Rounding adds 1.5·2²³, whose sum rounds half to even to an integer and leaves it in the low bits.
A fused multiply-add would skip the rounding of x·s that the reference makes, so contraction is off.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_bitnet.kernels import early
from sparse_bitnet.kernels.early import wait

SMALLEST_BITS = tl.constexpr(0x3727C5AC)  # 1e-5 as float32
ROUNDER = tl.constexpr(12582912.0)  # 1.5 · 2²³
ROUNDER_BITS = tl.constexpr(0x4B400000)
MOST_CHUNKS = 20
FEW_ROWS = 32
EARLY_ROWS = 32
PEAK_CHUNK = 1024


@triton.jit
def _scaled(at, mask, factor, FACTOR: tl.constexpr):
    x = tl.load(at, mask=mask, other=0.0)
    if FACTOR:
        x = (x.to(tl.float32) * factor).to(x.dtype)
    return x


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
    factor_ptr,
    q_ptr,
    plain_ptr,
    delta_ptr,
    sum_ptr,
    scale_ptr,
    columns,
    x_stride,
    q_stride,
    epsilon,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    CHUNKS: tl.constexpr,
    FACTOR: tl.constexpr,
    NORM: tl.constexpr,
    SWIGLU: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOWS: tl.constexpr,
    WORDS: tl.constexpr,
    PLAIN: tl.constexpr,
    ADD: tl.constexpr,
    EARLY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    q_ptr += row * q_stride
    if PLAIN:
        plain_ptr += row * columns
    factor = 1.0
    norm = ()
    if NORM and EARLY:  # a weight, and so there before what is normed
        for i in tl.static_range(CHUNKS):
            lanes = i * STEP + tl.arange(0, CHUNK)
            mask = (tl.arange(0, CHUNK) < STEP) & (lanes < columns)
            norm = norm + (tl.load(norm_ptr + lanes, mask=mask, other=0.0),)
    wait(EARLY)
    if FACTOR:
        factor = tl.load(factor_ptr + row)
    values = ()
    squares = tl.zeros((CHUNK,), tl.float32)
    for i in tl.static_range(CHUNKS):
        lanes = i * STEP + tl.arange(0, CHUNK)
        mask = (tl.arange(0, CHUNK) < STEP) & (lanes < columns)
        x = _scaled(x_ptr + lanes, mask, factor, FACTOR)
        if ADD:
            delta = tl.load(delta_ptr + row * columns + lanes, mask=mask, other=0.0)
            x = (x.to(tl.float32) + delta.to(tl.float32)).to(x.dtype)
            tl.store(sum_ptr + row * columns + lanes, x, mask=mask)
        if SWIGLU:
            x = _swiglu(x, _scaled(x_ptr + columns + lanes, mask, factor, FACTOR))
        if NORM:
            squares += x.to(tl.float32) * x.to(tl.float32)
        values = values + (x,)
    if NORM:
        inverse_rms = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(squares) / columns + epsilon))
        normed = ()
        for i in tl.static_range(CHUNKS):
            if EARLY:
                weight = norm[i]
            else:
                lanes = i * STEP + tl.arange(0, CHUNK)
                mask = (tl.arange(0, CHUNK) < STEP) & (lanes < columns)
                weight = tl.load(norm_ptr + lanes, mask=mask, other=0.0)
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
        if GROUP == 0:
            tl.store(q_ptr + lanes, rounded.to(tl.int8), mask=lanes < columns)
        else:
            if PLAIN:
                at = i * STEP + tl.arange(0, CHUNK)
                mask = (tl.arange(0, CHUNK) < STEP) & (at < columns)
                tl.store(plain_ptr + at, rounded.to(tl.int8), mask=mask)
            # Window w of group g is one 32-bit word: pairs g·L + w and g·L + w + 1 of the row.
            low, high = tl.split(tl.reshape(rounded, (CHUNK // 2, 2)))
            pairs = (low & 0xFF) | ((high & 0xFF) << 8)
            word = tl.arange(0, WORDS)
            first = word // WINDOWS * (GROUP // 2) + word % WINDOWS
            first = tl.minimum(first, CHUNK // 2 - 2)
            packed = tl.gather(pairs, first, 0) | (tl.gather(pairs, first + 1, 0) << 16)
            at = i * (STEP // GROUP * WINDOWS) + word
            inside = (word < STEP // GROUP * WINDOWS) & (at < columns // GROUP * WINDOWS)
            tl.store(q_ptr.to(tl.pointer_type(tl.int32)) + at, packed, mask=inside)


@triton.jit
def _by_peaks_kernel(
    x_ptr,
    peaks_ptr,
    q_ptr,
    scale_ptr,
    columns,
    peaks,
    PEAKS: tl.constexpr,
    CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    peak = tl.arange(0, PEAKS)
    wait(EARLY)
    bits = tl.load(peaks_ptr + row * peaks + peak, mask=peak < peaks, other=0)
    x = tl.load(x_ptr + row * columns + lanes, mask=lanes < columns, other=0.0).to(tl.float32)
    magnitude = tl.maximum(tl.max(bits), SMALLEST_BITS).to(tl.float32, bitcast=True)
    tl.store(scale_ptr + row, tl.div_rn(magnitude, 127.0))  # the same from every program
    rounded = _rounded(x, tl.div_rn(1.0, magnitude) * 127.0)
    tl.store(q_ptr + row * columns + lanes, rounded.to(tl.int8), mask=lanes < columns)


def by_peaks(x: Tensor, peaks: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize rows of which the largest magnitude is nearly known, many programs a row.

    Args:
        x: ``[rows, columns]``, float, contiguous.
        peaks: int32 ``[rows, any]``: ``magnitude_bits`` of parts of a row that cover it.

    Returns:
        int8 ``[rows, columns]``, float32 ``[rows, 1]``.
    """
    rows, columns = x.shape
    quantized = torch.empty_like(x, dtype=torch.int8)
    scale = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    _by_peaks_kernel[(rows, triton.cdiv(columns, PEAK_CHUNK))](
        x,
        peaks,
        quantized,
        scale,
        columns,
        peaks.shape[1],
        PEAKS=triton.next_power_of_2(peaks.shape[1]),
        CHUNK=PEAK_CHUNK,
        num_warps=8,
        enable_fp_fusion=False,
        **early.launch_options(x),
    )
    return quantized, scale


def _shape(rows: int, columns: int, swiglu: bool, lifted: bool) -> tuple[int, int]:
    """Chunk length and warps; measured on an H200, where more or fewer registers a row lose.

    Chunks are unrolled, so their number is kept small enough to compile in a few seconds. Few rows
    leave most multiprocessors idle, and the one that serves a long row wants all its threads.
    """
    power = triton.next_power_of_2(max(columns, 64))
    few = rows <= FEW_ROWS and not lifted
    if few and not swiglu and power <= 8192:
        return power, max(1, power // 512)
    if not (swiglu or lifted) and power <= 4096:
        return power, 1 if power <= 1024 else 2
    largest = (2048 if lifted else 4096) if swiglu else (512 if lifted else 1024)
    chunk = min(power, largest)
    while columns > MOST_CHUNKS * chunk:
        chunk *= 2
    return chunk, max(1, min(32 if few else 8, chunk // 128))


def quantize(
    x: Tensor,
    norm_weight: Tensor | None = None,
    epsilon: float = 0.0,
    swiglu: bool = False,
    group: int = 0,
    factor: Tensor | None = None,
    plain: Tensor | None = None,
    delta: Tensor | None = None,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel; arguments and results as ``quantize_fused`` of this operation.

    When lifting, ``plain`` (int8, contiguous, ``[..., in]``) receives the values unlifted too. With
    ``delta`` (contiguous, like ``x``), ``total`` receives x + delta, and that is what is quantized.
    """
    columns = x.shape[-1] // 2 if swiglu else x.shape[-1]
    width = columns // group * (2 * group - 4) if group else columns
    quantized = torch.empty((*x.shape[:-1], width), dtype=torch.int8, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    if scale.numel() == 0:
        return quantized, scale
    chunk, warps = _shape(rows.shape[0], columns, swiglu, group > 0)
    whole = math.lcm(max(group, 1), 8)  # chunks end with a group, and on a vector of eight
    chunk = max(chunk, triton.next_power_of_2(whole))
    step = chunk // whole * whole
    windows = max(1, group // 2 - 1)
    norm = None if norm_weight is None else norm_weight.contiguous()
    # Of many short rows each program would wait for nothing, at twice the time. A norm's weight is
    # read before the wait, so it must not have been copied just now.
    begins_early = rows.shape[0] <= EARLY_ROWS and norm is norm_weight
    options = early.launch_options(x) if begins_early else early.OFF
    _quantize_kernel[(rows.shape[0],)](
        rows,
        norm,
        None if factor is None else factor.reshape(-1).contiguous(),
        quantized,
        plain,
        delta,
        total,
        scale,
        columns,
        rows.stride(0),
        width,
        epsilon,
        CHUNK=chunk,
        STEP=step,
        CHUNKS=triton.cdiv(columns, step),
        FACTOR=factor is not None,
        NORM=norm_weight is not None,
        SWIGLU=swiglu,
        GROUP=group,
        WINDOWS=windows,
        WORDS=triton.next_power_of_2(step // group * windows) if group else 1,
        PLAIN=plain is not None,
        ADD=delta is not None,
        num_warps=warps,
        enable_fp_fusion=False,
        **options,
    )
    return quantized, scale
