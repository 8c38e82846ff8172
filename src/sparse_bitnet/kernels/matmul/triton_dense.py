# mypy: disable-error-code="no-untyped-def,assignment"
"""int8 × ternary on dense tensor cores, scales and bias applied in the epilogue.

One tile of Y a program. Two programs of 128×128 with four warps each on every multiprocessor beat
the larger tiles that bf16 likes: while one stores, the other multiplies. The K loop is fed by the
tensor memory accelerator where there is one (sm_90 and newer) and by asynchronous copies elsewhere.
Tiles are visited in groups of rows, so that neighbouring programs share operands in the L2 cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sparse_bitnet.kernels.platform import capability

DESCRIPTOR_CAPABILITY = (9, 0)
DESCRIPTOR_ALIGNMENT = 16


@dataclass(frozen=True)
class Tiles:
    """One way to run the kernel."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    descriptors: bool = False
    group: int = 8


SIXTEEN_ROWS = Tiles(16, 128, 128, 4, 4)
FEW_ROWS = Tiles(32, 64, 256, 4, 3)
FEW_ROWS_TMA = Tiles(64, 64, 128, 4, 4, descriptors=True)
SOME_ROWS_TMA = Tiles(64, 128, 128, 4, 4, descriptors=True)
MANY_ROWS = Tiles(128, 128, 128, 4, 3, group=16)
MANY_ROWS_TMA = Tiles(128, 128, 128, 4, 3, descriptors=True, group=16)


@triton.jit
def _tile_of(program, rows, columns, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    tiles_m = tl.cdiv(rows, BM)
    width = GROUP * tl.cdiv(columns, BN)
    first = program // width * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    return first + program % width % height, program % width // height


@triton.jit
def _store(
    total,
    y_ptr,
    x_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    tile_m,
    tile_n,
    rows,
    columns,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BIAS: tl.constexpr,
):
    m = tile_m * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    x_scale = tl.load(x_scale_ptr + m, mask=m < rows, other=0.0)
    w_scale = tl.load(w_scale_ptr + n, mask=n < columns, other=0.0)
    y = total.to(tl.float32) * x_scale[:, None] * w_scale[None, :]
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    where = m.to(tl.int64)[:, None] * columns + n[None, :]
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    tl.store(y_ptr + where, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _pointer_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    x_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    rows,
    columns,
    inner,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
):
    tile_m, tile_n = _tile_of(tl.program_id(0), rows, columns, BM, BN, GROUP)
    m = tile_m * BM + tl.arange(0, BM)
    n = tile_n * BN + tl.arange(0, BN)
    # Rows beyond the end read row 0 instead: cheaper than a mask, and the store drops them.
    m = tl.where(m < rows, m, 0)
    n = tl.where(n < columns, n, 0)
    k = tl.arange(0, BK)
    x_at = x_ptr + m.to(tl.int64)[:, None] * inner + k[None, :]
    w_at = w_ptr + n.to(tl.int64)[None, :] * inner + k[:, None]
    total = tl.zeros((BM, BN), tl.int32)
    for start in range(0, inner, BK):
        if EVEN:
            x = tl.load(x_at)
            w = tl.load(w_at)
        else:
            x = tl.load(x_at, mask=(k < inner - start)[None, :], other=0)
            w = tl.load(w_at, mask=(k < inner - start)[:, None], other=0)
        total = tl.dot(x, w, total, out_dtype=tl.int32)
        x_at += BK
        w_at += BK
    _store(
        total,
        y_ptr,
        x_scale_ptr,
        w_scale_ptr,
        bias_ptr,
        tile_m,
        tile_n,
        rows,
        columns,
        BM,
        BN,
        BIAS,
    )


@triton.jit
def _descriptor_kernel(
    x_desc,
    w_desc,
    y_ptr,
    x_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    rows,
    columns,
    inner,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
):
    tile_m, tile_n = _tile_of(tl.program_id(0), rows, columns, BM, BN, GROUP)
    total = tl.zeros((BM, BN), tl.int32)
    for start in range(0, inner, BK):  # what lies beyond the end is read as zero
        x = x_desc.load([tile_m * BM, start])
        w = w_desc.load([tile_n * BN, start])
        total = tl.dot(x, w.T, total, out_dtype=tl.int32)
    _store(
        total,
        y_ptr,
        x_scale_ptr,
        w_scale_ptr,
        bias_ptr,
        tile_m,
        tile_n,
        rows,
        columns,
        BM,
        BN,
        BIAS,
    )


def run(
    x_q: Tensor,
    x_scale: Tensor,
    ternary: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    y: Tensor,
    tiles: Tiles,
) -> None:
    """Launch with these tiles; every tensor contiguous, ``y`` ``[tokens, out]`` is overwritten."""
    rows, inner = x_q.shape
    columns = ternary.shape[0]
    tail = (y, x_scale, w_scale, bias, rows, columns, inner)
    grid = (triton.cdiv(rows, tiles.m) * triton.cdiv(columns, tiles.n),)
    constants = {
        "BM": tiles.m,
        "BN": tiles.n,
        "BK": tiles.k,
        "GROUP": tiles.group,
        "BIAS": bias is not None,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        "enable_fp_fusion": False,  # the bias must not be fused into the rounding of the product
    }
    if tiles.descriptors:
        x_desc = TensorDescriptor(x_q, [rows, inner], [inner, 1], [tiles.m, tiles.k])
        w_desc = TensorDescriptor(ternary, [columns, inner], [inner, 1], [tiles.n, tiles.k])
        _descriptor_kernel[grid](x_desc, w_desc, *tail, **constants)
    else:
        _pointer_kernel[grid](x_q, ternary, *tail, EVEN=inner % tiles.k == 0, **constants)


def tiles_for(x_q: Tensor, ternary: Tensor) -> Tiles:
    """Tiles by the number of rows, the fastest of those measured on an H200."""
    rows, inner = x_q.shape
    descriptors = (
        x_q.is_cuda
        and capability(x_q.device.index) >= DESCRIPTOR_CAPABILITY
        and inner % DESCRIPTOR_ALIGNMENT == 0
        and x_q.data_ptr() % DESCRIPTOR_ALIGNMENT == ternary.data_ptr() % DESCRIPTOR_ALIGNMENT == 0
    )
    if rows <= 16:
        return SIXTEEN_ROWS
    if rows <= 64:
        return FEW_ROWS_TMA if descriptors else FEW_ROWS
    if rows <= 512 and descriptors:
        return SOME_ROWS_TMA
    return MANY_ROWS_TMA if descriptors else MANY_ROWS


def matmul(
    x_q: Tensor,
    x_scale: Tensor,
    ternary: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Y of contiguous operands; arguments and results of the reference."""
    y = torch.empty((x_q.shape[0], ternary.shape[0]), dtype=out_dtype, device=x_q.device)
    if y.numel():
        run(x_q, x_scale, ternary, w_scale, bias, y, tiles_for(x_q, ternary))
    return y
