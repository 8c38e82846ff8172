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
from torch import Tensor

from sparse_bitnet.kernels import tuning
from sparse_bitnet.kernels.matmul.triton_dot import DotTiles, dot_programs, run_dot
from sparse_bitnet.kernels.matmul.triton_packed import CANDIDATES, memory_key
from sparse_bitnet.kernels.quantize_activations.triton import by_peaks

COPIES = 3  # of a weight while it is measured, so that L2 does not hold it
SWIGLU_TILES = {
    name: CANDIDATES[name]
    for name in (
        "dot 16x32 ahead",
        "dot 32x32 ahead",
        "dot 16x64 ahead",
        "dot 8x64 ahead",
        "dot 4x128",
        "dot 4x128 ahead",
    )
}


def run_swiglu(
    x_q: Tensor, x_scale: Tensor, packed: Tensor, w_scale: Tensor, dtype: torch.dtype, name: str
) -> tuple[Tensor, Tensor]:
    """Launch one candidate; arguments and results as those of :func:`swiglu_rows`."""
    tiles = SWIGLU_TILES[name]
    assert isinstance(tiles, DotTiles)
    tokens, columns = x_q.shape[0], packed.shape[0]
    h = torch.empty((tokens, columns // 2), dtype=dtype, device=x_q.device)
    programs = dot_programs(columns, tiles)
    peaks = torch.empty((tokens, programs), dtype=torch.int32, device=x_q.device)
    run_dot(x_q, x_scale, packed, w_scale, None, h, tiles, peaks=peaks)
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
    if x_q.is_cuda and tuning.may_measure_now():
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
