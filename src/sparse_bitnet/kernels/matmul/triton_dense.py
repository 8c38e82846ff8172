# mypy: disable-error-code="no-untyped-def,assignment"
"""int8 × ternary on dense tensor cores, scales and bias applied in the epilogue.

One tile of Y a program. Two programs of 128×128 with four warps each on every multiprocessor beat
the larger tiles that bf16 likes: while one stores, the other multiplies. The K loop is fed by the
tensor memory accelerator where there is one (sm_90 and newer) and by asynchronous copies elsewhere.
Tiles are visited in groups of rows, so that neighbouring programs share operands in the L2 cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from sparse_bitnet.kernels import autotune
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


CANDIDATES = {
    "128x128 tma": Tiles(128, 128, 128, 4, 3, True, 16),
    "128x128": Tiles(128, 128, 128, 4, 3, False, 16),
    "128x256 tma": Tiles(128, 256, 128, 8, 4, True),
    "256x128 tma": Tiles(256, 128, 128, 8, 4, True),
    "64x128 tma": Tiles(64, 128, 128, 4, 4, True),
    "64x128 tma 3": Tiles(64, 128, 128, 4, 3, True),
    "64x64 tma": Tiles(64, 64, 128, 4, 4, True),
    "16x128": Tiles(16, 128, 128, 4, 4),
    "32x64": Tiles(32, 64, 256, 4, 3),
}


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
    """Launch one candidate; every tensor contiguous, ``y`` ``[tokens, out]`` is overwritten."""
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


def candidates(x_q: Tensor, ternary: Tensor) -> list[str]:
    """Names of the candidates that this device and these shapes can run, the usual best first."""
    rows, inner = x_q.shape
    descriptors = (
        x_q.is_cuda
        and capability(x_q.device.index) >= DESCRIPTOR_CAPABILITY
        and inner % DESCRIPTOR_ALIGNMENT == 0
        and x_q.data_ptr() % DESCRIPTOR_ALIGNMENT == ternary.data_ptr() % DESCRIPTOR_ALIGNMENT == 0
    )
    if rows <= 16:
        names = ["16x128", "32x64"]
    elif rows <= 64:
        names = ["64x64 tma", "64x128 tma 3", "32x64", "16x128"]
    elif rows <= 512:
        names = ["64x128 tma", "128x128 tma", "64x64 tma", "128x128"]
    else:
        names = ["128x128 tma", "128x128", "128x256 tma", "256x128 tma"]
    kept = [name for name in names if descriptors or not CANDIDATES[name].descriptors]
    return kept or ["128x128"]


def memory_key(rows: int, columns: int, inner: int) -> str:
    return f"dense {autotune.bucket(rows)}x{columns}x{inner}"


def matmul(
    x_q: Tensor,
    x_scale: Tensor,
    ternary: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Run the candidate remembered for this shape, else the usual best one."""
    rows, inner = x_q.shape
    y = torch.empty((rows, ternary.shape[0]), dtype=out_dtype, device=x_q.device)
    if y.numel() == 0:
        return y
    names = candidates(x_q, ternary)
    name = autotune.remembered(x_q, memory_key(rows, ternary.shape[0], inner), names)
    run(x_q, x_scale, ternary, w_scale, bias, y, CANDIDATES[name])
    return y


@torch.no_grad()
def tune(x_q: Tensor, x_scale: Tensor, ternary: Tensor, w_scale: Tensor) -> None:
    """Time the candidates for a shape under load, and remember them; nothing if that was done.

    Args:
        x_q, x_scale: int8 ``[tokens, in]`` and float32 ``[tokens]``.
        ternary, w_scale: int8 ``[out, in]`` and float32 ``[out]``.
    """
    rows, inner = x_q.shape
    memory = autotune.memory(x_q.device.index)
    key = memory_key(rows, ternary.shape[0], inner)
    if memory.get(key):
        return
    y = torch.empty((rows, ternary.shape[0]), dtype=torch.bfloat16, device=x_q.device)
    calls, times = {}, {}
    for name in candidates(x_q, ternary):
        calls[name] = [partial(run, x_q, x_scale, ternary, w_scale, None, y, CANDIDATES[name])]
        try:
            times[name] = autotune.microseconds(calls[name])
        except (RuntimeError, OutOfResources):
            continue  # this GPU has too little shared memory for the tile, say
    if times:
        memory.put(key, autotune.under_load(calls, times))
