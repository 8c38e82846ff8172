# ruff: noqa: RUF005  (Triton's language concatenates tuples, it does not unpack them)
# mypy: disable-error-code="no-untyped-def,assignment,var-annotated"
"""int8 × two-bit ternary for one or two tokens: byte-wise dot products (dp4a).

One warp a program, so that weight and activation registers line up without an exchange; the layout
is that of ``triton_packed.py``. Weights are asked for before the activations are there
(``kernels/early.py``): the first words into registers, or all rows of a program into L2 (fetch).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sparse_bitnet.kernels import early
from sparse_bitnet.kernels.early import fetch, wait
from sparse_bitnet.kernels.quantize_activations.triton import _swiglu, magnitude_bits

MOST_EARLY_PROGRAMS = 4096
"""All resident at once on an H100 or H200; of more, each later one would wait for nothing."""
LINE_WORDS = tl.constexpr(32)  # 128 bytes
TOP_PAIRS = tl.constexpr(-0x3F3F3F40)  # 0xC0C0C0C0


@dataclass(frozen=True)
class DotTiles:
    """Byte-wise dot products: rows and words a program takes at once; does it read ahead?

    ``fetch``: it asks for all its rows before it waits for the kernel ahead of it.
    """

    rows: int
    words: int
    ahead: bool
    fetch: bool = False


@triton.jit
def _dot4(a, b, c, ASM: tl.constexpr):
    """Σ of four int8 products, added to c. The interpreter knows no assembly."""
    if ASM:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [a, b, c],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        for byte in tl.static_range(4):
            c += ((a << (24 - 8 * byte)) >> 24) * ((b << (24 - 8 * byte)) >> 24)
        return c


@triton.jit
def _words(row_ptr, word, row_words, EVEN: tl.constexpr):
    """Words of all rows, zeros behind a row's last."""
    at = row_ptr[:, None] + word[None, :]
    if EVEN:
        return tl.load(at)
    else:
        return tl.load(at, mask=(word < row_words)[None, :], other=0)


@triton.jit
def _lanes(x_ptr, lane, x_words, EVEN: tl.constexpr):
    """Activations, four a word, zeros behind the last."""
    if EVEN:
        return tl.load(x_ptr + lane)
    else:
        return tl.load(x_ptr + lane, mask=lane < x_words, other=0)


@triton.jit
def plus(residual, y):
    """The sum of two values of one dtype, rounded once, as a separate addition would."""
    return (residual.to(tl.float32) + y.to(tl.float32)).to(y.dtype)


@triton.jit
def _dot_kernel(
    x_ptr,
    words_ptr,
    y_ptr,
    x_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    residual_ptr,
    peaks_ptr,
    columns,
    row_words,
    x_words,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    AHEAD: tl.constexpr,
    FETCH: tl.constexpr,
    SWIGLU: tl.constexpr,
    ASM: tl.constexpr,
    EVEN: tl.constexpr,
    EARLY: tl.constexpr,
):
    if SWIGLU:  # rows of gate and up in turns, of which each pair makes one value
        inner = columns // 2
        value = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS) // 2
        inside = value < inner
        n = value + tl.arange(0, ROWS) % 2 * inner
    else:
        n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        inside = n < columns
    # Rows behind the last are computed as row 0 and not stored: loads need no mask for them.
    row_ptr = words_ptr + tl.where(inside, n, 0).to(tl.int64) * row_words
    if FETCH:
        for start in range(0, row_words, 32 * LINE_WORDS):
            word = start + tl.arange(0, 32) * LINE_WORDS
            fetch(row_ptr[:, None] + tl.minimum(word, row_words - 1)[None, :], EARLY)
    sums = ()
    for _ in tl.static_range(TOKENS):
        sums = sums + (tl.zeros((ROWS, WORDS), tl.int32),)
    w_scale = tl.load(w_scale_ptr + n, mask=inside, other=0.0)
    if BIAS:
        bias = tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    if AHEAD:
        ahead = _words(row_ptr, tl.arange(0, WORDS), row_words, EVEN)
    wait(EARLY)
    x_scales, residuals = (), ()  # asked for now, there when the sums are
    for token in tl.static_range(TOKENS):
        x_scales = x_scales + (tl.load(x_scale_ptr + token),)
        if RESIDUAL:
            at = residual_ptr + token * columns + n
            residuals = residuals + (tl.load(at, mask=inside, other=0.0),)
    for start in range(0, row_words, WORDS):
        word = start + tl.arange(0, WORDS)
        if AHEAD:  # the next words are asked for before these are used
            packed = ahead
            after = word + WORDS
            if EVEN:  # after the last words these are asked for again
                after = tl.minimum(start + WORDS, row_words - WORDS) + tl.arange(0, WORDS)
            ahead = _words(row_ptr, after, row_words, EVEN)
        else:
            packed = _words(row_ptr, word, row_words, EVEN)
        for pair in tl.static_range(4):
            plane = (packed << (6 - 2 * pair)) & TOP_PAIRS
            lane = word // 4 * 16 + word % 4 + 4 * pair
            added = ()
            for token in tl.static_range(TOKENS):
                x = _lanes(x_ptr + token * x_words, lane, x_words, EVEN)
                x = tl.broadcast_to(x[None, :], (ROWS, WORDS))
                added = added + (_dot4(plane, x, sums[token], ASM),)
            sums = added
    for token in tl.static_range(TOKENS):
        total = tl.sum(sums[token], axis=1) >> 6
        y = total.to(tl.float32) * x_scales[token] * w_scale
        if BIAS:
            y += bias
        y = y.to(y_ptr.dtype.element_ty)
        if RESIDUAL:
            y = plus(residuals[token], y)
        if SWIGLU:
            gate, up = tl.split(tl.reshape(tl.where(inside, y, 0.0), (ROWS // 2, 2)))
            h = _swiglu(gate, up)
            at = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
            tl.store(y_ptr + token * inner + at, h, mask=at < inner)
            peak = tl.max(magnitude_bits(h))
            tl.store(peaks_ptr + token * tl.num_programs(0) + tl.program_id(0), peak)
        else:
            tl.store(y_ptr + token * columns + n, y, mask=inside)


def dot_programs(columns: int, tiles: DotTiles) -> int:
    """Programs of a byte-wise product of this many rows."""
    return triton.cdiv(columns, tiles.rows)


def run_dot(
    x_q: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    y: Tensor,
    tiles: DotTiles,
    residual: Tensor | None = None,
    peaks: Tensor | None = None,
) -> None:
    """Launch byte-wise dot products; ``residual`` (like ``y``) is added to the rounded result.

    With ``peaks`` (int32 ``[tokens, dot_programs]``) the rows are those of gate before those of up,
    and ``y`` ``[tokens, out/2]`` receives silu(gate)·up, ``peaks`` the largest of each program.
    """
    if x_q.shape[1] % 4:
        x_q = F.pad(x_q, (0, -x_q.shape[1] % 4))
    columns, row_bytes = packed.shape
    programs = dot_programs(columns, tiles)
    options = early.launch_options(x_q) if programs <= MOST_EARLY_PROGRAMS else early.OFF
    _dot_kernel[(programs,)](
        x_q.view(torch.int32),
        packed.view(torch.int32),
        y,
        x_scale,
        w_scale,
        bias,
        residual,
        peaks,
        columns,
        row_bytes // 4,
        x_q.shape[1] // 4,
        TOKENS=x_q.shape[0],
        ROWS=tiles.rows,
        WORDS=tiles.words,
        BIAS=bias is not None,
        RESIDUAL=residual is not None,
        AHEAD=tiles.ahead,
        FETCH=tiles.fetch,
        SWIGLU=peaks is not None,
        ASM=x_q.is_cuda,
        EVEN=x_q.shape[1] % 64 == 0 and row_bytes // 4 % tiles.words == 0,
        num_warps=1,
        enable_fp_fusion=False,
        **options,
    )
