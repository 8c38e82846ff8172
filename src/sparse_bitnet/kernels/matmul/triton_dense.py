# mypy: disable-error-code="no-untyped-def,assignment"
"""int8 × ternary on dense tensor cores, scales and bias applied in the epilogue.

One tile of Y a program. Two programs of 128×128 with four warps each on every multiprocessor beat
the larger tiles that bf16 likes: while one stores, the other multiplies. Tiles are visited in
groups of rows, so that neighbouring programs share operands in the L2 cache. On Hopper
products of many tokens with ternary weights mostly go elsewhere (``matmul/__init__.py``), so it
does without the tensor memory accelerator.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """One way to run the kernel."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 8


FEW_ROWS = Tiles(16, 128, 128, 4, 4)
SOME_ROWS = Tiles(32, 64, 256, 4, 3)
MANY_ROWS = Tiles(128, 128, 128, 4, 3, group=16)


@triton.jit
def _tile_of(program, rows, columns, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    tiles_m = tl.cdiv(rows, BM)
    width = GROUP * tl.cdiv(columns, BN)
    first = program // width * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    return first + program % width % height, program % width // height


@triton.jit
def _kernel(
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
    k = tl.arange(0, BK)
    # Rows beyond the end read row 0 instead: cheaper than a mask, and the store drops them.
    x_at = x_ptr + tl.where(m < rows, m, 0).to(tl.int64)[:, None] * inner + k[None, :]
    w_at = w_ptr + tl.where(n < columns, n, 0).to(tl.int64)[None, :] * inner + k[:, None]
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
    x_scale = tl.load(x_scale_ptr + m, mask=m < rows, other=0.0)
    w_scale = tl.load(w_scale_ptr + n, mask=n < columns, other=0.0)
    y = total.to(tl.float32) * x_scale[:, None] * w_scale[None, :]
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    where = m.to(tl.int64)[:, None] * columns + n[None, :]
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    tl.store(y_ptr + where, y.to(y_ptr.dtype.element_ty), mask=inside)


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
    _kernel[(triton.cdiv(rows, tiles.m) * triton.cdiv(columns, tiles.n),)](
        x_q,
        ternary,
        y,
        x_scale,
        w_scale,
        bias,
        rows,
        columns,
        inner,
        BM=tiles.m,
        BN=tiles.n,
        BK=tiles.k,
        GROUP=tiles.group,
        BIAS=bias is not None,
        EVEN=inner % tiles.k == 0,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        enable_fp_fusion=False,  # the bias must not be fused into the rounding of the product
    )


def tiles_for(rows: int) -> Tiles:
    """The fastest of the tiles measured on an H200 for that many rows."""
    return FEW_ROWS if rows <= 16 else SOME_ROWS if rows <= 64 else MANY_ROWS


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
        run(x_q, x_scale, ternary, w_scale, bias, y, tiles_for(x_q.shape[0]))
    return y
