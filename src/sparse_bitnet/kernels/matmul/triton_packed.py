# mypy: disable-error-code="no-untyped-def,assignment"
"""int8 × two-bit ternary for few tokens, where reading the weight is all the time there is.

Layout. A row is cut into blocks of 64 weights, 16 bytes. Byte B of a block holds weights B, 16 + B,
32 + B and 48 + B in bit pairs 0, 1, 2 and 3, as two's complement (−1 = 11, 0 = 00, 1 = 01).
Shifting a pair to the top of its byte and masking the rest away gives 64·T as int8, four weights at
once and no bias to subtract; a plane of 16 bytes then meets 16 consecutive activations. Sums carry
the factor 64, which an arithmetic shift removes exactly; they fit int32 below 2¹⁸ input features.

Two kernels. Up to a few tokens: byte-wise dot products (``triton_dot.py``). More tokens: the packed
bytes reach the tensor core's register layout once, and the planes are taken out of them there.
Where rows are too few to fill the device, a row is cut over K, and a second, small kernel adds the
shares: they are integers, so the result does not depend on the cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sparse_bitnet.kernels import early, tuning
from sparse_bitnet.kernels.early import wait
from sparse_bitnet.kernels.matmul.triton_dot import DotTiles, plus, run_dot

BLOCK = 64
LONGEST_ROW = 2**18
MOST_DOT_TOKENS = 2
FEW_ROWS = 8192
JOIN = 512


def pack_rows(ternary: Tensor) -> Tensor:
    """int8 ``[out, in]`` → uint8 ``[out, ceil(in/64)·16]`` in the layout above."""
    out, columns = ternary.shape
    pairs = F.pad(ternary, (0, -columns % BLOCK)).view(torch.uint8) & 3
    pairs = pairs.view(out, -1, 4, 16)
    packed = pairs[:, :, 0] | pairs[:, :, 1] << 2 | pairs[:, :, 2] << 4 | pairs[:, :, 3] << 6
    return packed.reshape(out, -1)


@dataclass(frozen=True)
class MmaTiles:
    """Tensor cores: rows and bytes of a row a program holds at once, programs a row is cut into."""

    rows: int
    bytes: int
    splits: int
    warps: int
    stages: int


CANDIDATES: dict[str, DotTiles | MmaTiles] = {
    "dot 4x128": DotTiles(4, 128, False),
    "dot 2x128 ahead": DotTiles(2, 128, True),
    "dot 4x256 ahead": DotTiles(4, 256, True),
    "dot 4x128 ahead": DotTiles(4, 128, True),
    "dot 2x256 ahead": DotTiles(2, 256, True),
    "dot 8x64 ahead": DotTiles(8, 64, True),
    "dot 16x64 ahead": DotTiles(16, 64, True),
    "dot 16x32 ahead": DotTiles(16, 32, True),
    "dot 32x32 ahead": DotTiles(32, 32, True),
    "dot 4x128 fetch": DotTiles(4, 128, False, True),
    "dot 2x128 ahead fetch": DotTiles(2, 128, True, True),
    "mma 128x128": MmaTiles(128, 128, 1, 8, 3),
    "mma 256x64": MmaTiles(256, 64, 1, 8, 4),
    "mma 128x64": MmaTiles(128, 64, 1, 8, 3),
    "mma 64x64": MmaTiles(64, 64, 1, 4, 4),
    "mma 128x64 /8": MmaTiles(128, 64, 8, 4, 4),
    "mma 128x128 /4": MmaTiles(128, 128, 4, 8, 3),
    "mma 64x128 /8": MmaTiles(64, 128, 8, 4, 3),
}


@triton.jit
def _plane(packed, PAIR: tl.constexpr, ASM: tl.constexpr):
    """One bit pair of every byte as 64·T in int8; four bytes an instruction."""
    if ASM:
        if PAIR == 0:
            return tl.inline_asm_elementwise(
                "{.reg .b32 t; shl.b32 t, $1, 6; and.b32 $0, t, 0xC0C0C0C0;}",
                "=r,r",
                [packed],
                dtype=tl.int8,
                is_pure=True,
                pack=4,
            )
        elif PAIR == 1:
            return tl.inline_asm_elementwise(
                "{.reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xC0C0C0C0;}",
                "=r,r",
                [packed],
                dtype=tl.int8,
                is_pure=True,
                pack=4,
            )
        elif PAIR == 2:
            return tl.inline_asm_elementwise(
                "{.reg .b32 t; shl.b32 t, $1, 2; and.b32 $0, t, 0xC0C0C0C0;}",
                "=r,r",
                [packed],
                dtype=tl.int8,
                is_pure=True,
                pack=4,
            )
        else:
            return tl.inline_asm_elementwise(
                "and.b32 $0, $1, 0xC0C0C0C0;",
                "=r,r",
                [packed],
                dtype=tl.int8,
                is_pure=True,
                pack=4,
            )
    else:
        return ((packed << (6 - 2 * PAIR)) & 0xC0).to(tl.int8, bitcast=True)


@triton.jit
def _mma_kernel(
    x_ptr,
    bytes_ptr,
    y_ptr,
    x_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    residual_ptr,
    partial_ptr,
    tokens,
    columns,
    row_bytes,
    inner,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
    SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ASM: tl.constexpr,
    EARLY: tl.constexpr,
):
    tile = tl.program_id(0)
    n = tile * ROWS + tl.arange(0, ROWS)
    t = tl.arange(0, TOKENS)
    inside = n < columns
    row_ptr = bytes_ptr + tl.where(inside, n, 0).to(tl.int64) * row_bytes
    total = tl.zeros((ROWS, TOKENS), tl.int32)
    if SPLITS == 1:
        w_scale = tl.load(w_scale_ptr + n, mask=inside, other=0.0)
        if BIAS:
            bias = tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    wait(EARLY)
    for start in range(tl.program_id(1) * BYTES, row_bytes, SPLITS * BYTES):
        byte = start + tl.arange(0, BYTES)
        packed = tl.load(
            row_ptr[:, None] + byte[None, :], mask=(byte < row_bytes)[None, :], other=0
        )
        for pair in tl.static_range(4):
            lane = byte // 16 * 64 + byte % 16 + 16 * pair
            x = tl.load(
                x_ptr + t[None, :] * inner + lane[:, None],
                mask=(t < tokens)[None, :] & (lane < inner)[:, None],
                other=0,
            )
            total = tl.dot(_plane(packed, pair, ASM), x, total, out_dtype=tl.int32)
    total = tl.trans(total) >> 6
    inside = (t < tokens)[:, None] & inside[None, :]
    where = t[:, None] * columns + n[None, :]
    if SPLITS > 1:
        tl.store(partial_ptr + tl.program_id(1) * tokens * columns + where, total, mask=inside)
    else:
        x_scale = tl.load(x_scale_ptr + t, mask=t < tokens, other=0.0)
        y = total.to(tl.float32) * x_scale[:, None] * w_scale[None, :]
        if BIAS:
            y += bias[None, :]
        y = y.to(y_ptr.dtype.element_ty)
        if RESIDUAL:
            y = plus(tl.load(residual_ptr + where, mask=inside, other=0.0), y)
        tl.store(y_ptr + where, y, mask=inside)


@triton.jit
def _join_kernel(
    partial_ptr,
    y_ptr,
    x_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    residual_ptr,
    tokens,
    columns,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The shares of one token's row, summed and scaled."""
    token = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < columns
    w_scale = tl.load(w_scale_ptr + n, mask=inside, other=0.0)
    if BIAS:
        bias = tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    wait(EARLY)
    total = tl.zeros((BLOCK_N,), tl.int32)
    for split in tl.static_range(SPLITS):
        at = partial_ptr + (split * tokens + token) * columns + n
        total += tl.load(at, mask=inside, other=0)
    y = total.to(tl.float32) * tl.load(x_scale_ptr + token) * w_scale
    if BIAS:
        y += bias
    y = y.to(y_ptr.dtype.element_ty)
    if RESIDUAL:
        residual = tl.load(residual_ptr + token * columns + n, mask=inside, other=0.0)
        y = plus(residual, y)
    tl.store(y_ptr + token * columns + n, y, mask=inside)


def run(
    x_q: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    y: Tensor,
    tiles: DotTiles | MmaTiles,
    residual: Tensor | None = None,
) -> None:
    """Launch one candidate; every tensor contiguous, ``y`` ``[tokens, out]`` is overwritten."""
    if isinstance(tiles, DotTiles):
        run_dot(x_q, x_scale, packed, w_scale, bias, y, tiles, residual)
        return
    tokens, inner = x_q.shape
    columns, row_bytes = packed.shape
    common = {
        "BIAS": bias is not None,
        "RESIDUAL": residual is not None,
        "enable_fp_fusion": False,
        **early.launch_options(x_q),
    }
    partial = None
    if tiles.splits > 1:
        partial = torch.empty((tiles.splits, *y.shape), dtype=torch.int32, device=y.device)
    _mma_kernel[(triton.cdiv(columns, tiles.rows), tiles.splits)](
        x_q,
        packed,
        y,
        x_scale,
        w_scale,
        bias,
        residual,
        partial,
        tokens,
        columns,
        row_bytes,
        inner,
        TOKENS=max(16, triton.next_power_of_2(tokens)),
        ROWS=tiles.rows,
        BYTES=tiles.bytes,
        SPLITS=tiles.splits,
        ASM=x_q.is_cuda,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **common,
    )
    if partial is not None:
        _join_kernel[(tokens, triton.cdiv(columns, JOIN))](
            partial,
            y,
            x_scale,
            w_scale,
            bias,
            residual,
            tokens,
            columns,
            SPLITS=tiles.splits,
            BLOCK_N=JOIN,
            num_warps=4,
            **common,
        )


def candidates(tokens: int, columns: int) -> list[str]:
    """Names of the candidates for a token count and a number of rows, the usual best first."""
    dots = [name for name, t in CANDIDATES.items() if isinstance(t, DotTiles)]
    if columns < FEW_ROWS:
        dots.sort(key=lambda name: not name.endswith("ahead"))
    whole = [name for name, t in CANDIDATES.items() if isinstance(t, MmaTiles) and t.splits == 1]
    cut = [name for name, t in CANDIDATES.items() if isinstance(t, MmaTiles) and t.splits > 1]
    if tokens > 16:  # measured at 32 tokens on 7B shapes
        whole.sort(key=lambda name: name != "mma 256x64")
        cut.sort(key=lambda name: name != "mma 128x128 /4")
    mmas = cut + whole if columns < FEW_ROWS else whole + cut
    if tokens == 1:
        return dots
    return mmas + (dots if tokens <= MOST_DOT_TOKENS else [])


def memory_key(rows: int, columns: int, inner: int) -> str:
    return f"two-bit {tuning.bucket(rows)}x{columns}x{inner}"


def matmul(
    x_q: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    residual: Tensor | None = None,
) -> Tensor:
    """Run the candidate remembered for this shape, else the usual best one."""
    tokens, inner = x_q.shape
    columns = packed.shape[0]
    y = torch.empty((tokens, columns), dtype=out_dtype, device=x_q.device)
    if y.numel() == 0:
        return y
    names = candidates(tokens, columns)
    name = tuning.remembered(x_q, memory_key(tokens, columns, inner), names)
    run(x_q, x_scale, packed, w_scale, bias, y, CANDIDATES[name], residual)
    return y
