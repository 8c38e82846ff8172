"""The first half of a gated MLP for one or two tokens: two-bit product, SwiGLU, quantization.

A row's quantization waits for its largest magnitude, and one program that looks through a long row
for it leaves the GPU idle. Here every program of the product notes the largest of the few values
that it makes (``peaks``), and many small programs quantize the row by the largest of those:

    product   gate, up rows in turns → silu(gate)·up → h, peaks
    by_peaks  max(peaks) → scale; h → int8
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from sparse_bitnet.kernels import dispatch, early, tuning
from sparse_bitnet.kernels.matmul.triton_packed import (
    CANDIDATES,
    MOST_EARLY_PROGRAMS,
    DotTiles,
    _dot_kernel,
    memory_key,
)
from sparse_bitnet.kernels.quantize_activations.triton import by_peaks

COPIES = 3  # of a weight while it is measured, so that L2 does not hold it
SWIGLU_TILES = {
    name: CANDIDATES[name]
    for name in ("dot 16x64 ahead", "dot 16x64", "dot 8x64", "dot 4x128", "dot 4x128 fetch")
}


def run_swiglu(
    x_q: Tensor, x_scale: Tensor, packed: Tensor, w_scale: Tensor, dtype: torch.dtype, name: str
) -> tuple[Tensor, Tensor]:
    """Launch one candidate; arguments and results as those of :func:`swiglu_rows`."""
    tiles = SWIGLU_TILES[name]
    assert isinstance(tiles, DotTiles)
    tokens, columns = x_q.shape[0], packed.shape[0]
    if x_q.shape[1] % 4:
        x_q = F.pad(x_q, (0, -x_q.shape[1] % 4))
    programs = triton.cdiv(columns // 2, tiles.rows // 2)
    h = torch.empty((tokens, columns // 2), dtype=dtype, device=x_q.device)
    peaks = torch.empty((tokens, programs), dtype=torch.int32, device=x_q.device)
    options = early.launch_options(x_q) if programs <= MOST_EARLY_PROGRAMS else early.OFF
    _dot_kernel[(programs,)](
        x_q.view(torch.int32),
        packed.view(torch.int32),
        h,
        x_scale,
        w_scale,
        None,
        peaks,
        columns,
        packed.shape[1] // 4,
        x_q.shape[1] // 4,
        TOKENS=tokens,
        ROWS=tiles.rows,
        WORDS=tiles.words,
        BIAS=False,
        AHEAD=tiles.ahead,
        FETCH=tiles.fetch,
        SWIGLU=True,
        ASM=x_q.is_cuda,
        num_warps=1,
        enable_fp_fusion=False,
        **options,
    )
    return by_peaks(h, peaks)


def swiglu_rows(
    x_q: Tensor, x_scale: Tensor, packed: Tensor, w_scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """silu(gate)·up of one or two tokens, rounded to ``dtype`` where modules round, quantized.

    The largest magnitude, which quantization waits for, is gathered while the product runs.

    Args:
        x_q: int8 ``[tokens, in]``.
        x_scale: float32 ``[tokens]``.
        packed: two-bit rows ``[2·inner, …]``, of gate before those of up.
        w_scale: float32 ``[2·inner]``.

    Returns:
        int8 ``[tokens, inner]``, float32 ``[tokens, 1]``.
    """
    key = f"swiglu {memory_key(x_q.shape[0], packed.shape[0], x_q.shape[1])}"
    names = list(SWIGLU_TILES)
    if x_q.is_cuda and dispatch.may_measure_now():
        memory = tuning.memory(x_q.device.index)
        if memory.get(key) is None:
            cold = [packed, *(packed.clone() for _ in range(COPIES))]
            times = {}
            for name in names:
                calls = [partial(run_swiglu, x_q, x_scale, p, w_scale, dtype, name) for p in cold]
                times[name] = tuning.microseconds(calls)
            memory.put(key, times)
    name = tuning.remembered(x_q, key, names)
    return run_swiglu(x_q, x_scale, packed, w_scale, dtype, name)
