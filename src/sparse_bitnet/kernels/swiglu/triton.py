# ruff: noqa: RUF005  (Triton's language concatenates tuples, it does not unpack them)
# mypy: disable-error-code="no-untyped-def,assignment,var-annotated"
"""SwiGLU in one pass each way: to int8 forward, to two rows of e4m3 backward.

One program serves one token and holds its results in registers until their largest magnitude is
known, so what is read is read once and nothing is written in floating point.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_bitnet.kernels.backward.triton_fp8 import SMALLEST_BITS as SMALLEST_POWER_BITS
from sparse_bitnet.kernels.backward.triton_fp8 import power_and_inverse
from sparse_bitnet.kernels.quantize_activations.triton import (
    SMALLEST_BITS,
    _rounded,
    magnitude_bits,
)

REGISTERS = 65536
"""Of a multiprocessor, which one program must not exceed."""


class Launch(NamedTuple):
    """Of a thread: lanes in a chunk, lanes in a row (for up to 32 warps), registers at most."""

    lanes: int
    most: int
    registers: int | None

    def options(self, columns: int) -> dict[str, Any]:
        """Chunks that cover a row, and the warps that hold it."""
        warps = min(32, triton.next_power_of_2(triton.cdiv(columns, 32 * self.most)))
        chunk = 32 * warps * self.lanes
        chunks = triton.cdiv(columns, chunk)
        registers = self.registers and min(self.registers, REGISTERS // (32 * warps))
        return {"CHUNK": chunk, "CHUNKS": chunks, "num_warps": warps, "maxnreg": registers}


FORWARD = Launch(8, 48, None)
BACKWARD = Launch(8, 48, 128)
"""Two programs on a multiprocessor: while one waits for its token the other computes."""


@triton.jit
def _sigmoid(x, ASM: tl.constexpr):
    """1/(1 + e⁻ˣ) to two units in the last place, in four instructions instead of thirteen."""
    if ASM:
        return tl.inline_asm_elementwise(
            """{
            ex2.approx.ftz.f32 $0, $1;
            add.f32 $0, $0, 0f3F800000;
            rcp.approx.ftz.f32 $0, $0;
            }""",
            "=f,f",
            [x * -1.4426950408889634],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _quantize_kernel(
    gate_ptr,
    up_ptr,
    q_ptr,
    scale_ptr,
    columns,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    ASM: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * columns
    gate_ptr += start
    up_ptr += start
    q_ptr += start
    values = ()
    largest = tl.full((CHUNK,), SMALLEST_BITS, tl.int32)
    for i in tl.static_range(CHUNKS):
        lanes = i * CHUNK + tl.arange(0, CHUNK)
        gate = tl.load(gate_ptr + lanes, mask=lanes < columns, other=0.0)
        up = tl.load(up_ptr + lanes, mask=lanes < columns, other=0.0)
        # Rounded where the modules round.
        full = gate.to(tl.float32)
        silu = (full * _sigmoid(full, ASM)).to(gate.dtype)
        value = (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)
        largest = tl.maximum(largest, magnitude_bits(value))
        values = values + (value,)
    magnitude = tl.max(largest).to(tl.float32, bitcast=True)
    tl.store(scale_ptr + tl.program_id(0), tl.div_rn(magnitude, 127.0))
    inverse_step = tl.div_rn(1.0, magnitude) * 127.0  # the reference's own two roundings
    for i in tl.static_range(CHUNKS):
        lanes = i * CHUNK + tl.arange(0, CHUNK)
        rounded = _rounded(values[i].to(tl.float32), inverse_step)
        tl.store(q_ptr + lanes, rounded.to(tl.int8), mask=lanes < columns)


@triton.jit
def _gradients_kernel(
    dh_ptr,
    factor_ptr,
    gate_ptr,
    up_ptr,
    d_gate_ptr,
    gate_scale_ptr,
    d_up_ptr,
    up_scale_ptr,
    columns,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    ASM: tl.constexpr,
):
    row = tl.program_id(0)
    start = row.to(tl.int64) * columns
    dh_ptr += start
    gate_ptr += start
    up_ptr += start
    factor = tl.load(factor_ptr + row)
    d_gates = ()
    d_ups = ()
    largest_gate = tl.full((CHUNK,), SMALLEST_POWER_BITS, tl.int32)
    largest_up = tl.full((CHUNK,), SMALLEST_POWER_BITS, tl.int32)
    for i in tl.static_range(CHUNKS):
        lanes = i * CHUNK + tl.arange(0, CHUNK)
        mask = lanes < columns
        dh = tl.load(dh_ptr + lanes, mask=mask, other=0.0).to(tl.float32) * factor
        gate = tl.load(gate_ptr + lanes, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + lanes, mask=mask, other=0.0).to(tl.float32)
        sigmoid = _sigmoid(gate, ASM)
        silu = gate * sigmoid
        d_up = dh * silu
        d_gate = dh * up * (sigmoid + silu * (1.0 - sigmoid))
        # Bit patterns order as magnitudes do and let a NaN through.
        largest_gate = tl.maximum(largest_gate, d_gate.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        largest_up = tl.maximum(largest_up, d_up.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        d_gates = d_gates + (d_gate,)
        d_ups = d_ups + (d_up,)
    power, inverse_gate = power_and_inverse(tl.max(largest_gate))
    tl.store(gate_scale_ptr + row, power)
    power, inverse_up = power_and_inverse(tl.max(largest_up))
    tl.store(up_scale_ptr + row, power)
    for i in tl.static_range(CHUNKS):
        lanes = i * CHUNK + tl.arange(0, CHUNK)
        mask = lanes < columns
        scaled = (d_gates[i] * inverse_gate).to(tl.float8e4nv)
        tl.store(d_gate_ptr + start + lanes, scaled, mask=mask)
        scaled = (d_ups[i] * inverse_up).to(tl.float8e4nv)
        tl.store(d_up_ptr + start + lanes, scaled, mask=mask)


def quantize(gate: Tensor, up: Tensor, launch: Launch = FORWARD) -> tuple[Tensor, Tensor]:
    """Launch; arguments and results as ``reference.quantize``."""
    gate, up = gate.contiguous(), up.contiguous()
    quantized = torch.empty(gate.shape, dtype=torch.int8, device=gate.device)
    scale = torch.empty((*gate.shape[:-1], 1), dtype=torch.float32, device=gate.device)
    if scale.numel():
        columns = gate.shape[-1]
        _quantize_kernel[(scale.numel(),)](
            gate,
            up,
            quantized,
            scale,
            columns,
            ASM=gate.is_cuda,
            enable_fp_fusion=False,
            **launch.options(columns),
        )
    return quantized, scale


def fp8_gradients(
    dh: Tensor,
    factor: Tensor,
    gate: Tensor,
    up: Tensor,
    launch: Launch = BACKWARD,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch; arguments and results as ``reference.fp8_gradients``."""
    dh, factor, gate, up = (t.contiguous() for t in (dh, factor, gate, up))
    tokens, columns = gate.shape
    values = [torch.empty(gate.shape, dtype=torch.float8_e4m3fn, device=gate.device) for _ in "gu"]
    scales = [torch.empty(tokens, dtype=torch.float32, device=gate.device) for _ in "gu"]
    if tokens:
        _gradients_kernel[(tokens,)](
            dh,
            factor,
            gate,
            up,
            values[0],
            scales[0],
            values[1],
            scales[1],
            columns,
            ASM=gate.is_cuda,
            **launch.options(columns),
        )
    return values[0], scales[0], values[1], scales[1]
