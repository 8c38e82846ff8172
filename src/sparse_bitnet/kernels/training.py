"""The forward product of a training step: dense int8, or sparse tensor cores.

Weights are derived in every forward, so they are laid out for sparse tensor cores in every forward
too: encoded over windows, compressed by the library. Whether that pays depends on the shape, the
pattern and the tokens, so it is measured, layout included, once a shape, and remembered beside the
other measurements.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from sparse_bitnet import console
from sparse_bitnet.core.errors import BackendError
from sparse_bitnet.core.pattern import Pattern
from sparse_bitnet.formats import windows
from sparse_bitnet.kernels import autotune
from sparse_bitnet.kernels.library import register
from sparse_bitnet.kernels.matmul import structured_matmul, ternary_matmul
from sparse_bitnet.kernels.platform import runs_triton
from sparse_bitnet.kernels.quantize_activations import quantize_fused, quantize_with_lifted
from sparse_bitnet.kernels.ternarize import ternarize

DENSE, SPARSE = "dense", "sparse"
DRAW = 1.03
"""Times this close are a draw under load; then the dense product serves, which rounds once."""
SMALLEST = 2**20
"""Weights up to here stay dense: a step of them is bound by launches, and a layout needs more."""


@dataclass(frozen=True)
class Choice:
    """A product and the reason for it."""

    backend: str
    why: str
    microseconds: dict[str, float] = field(default_factory=dict)


def group_of(pattern: Pattern, device: torch.device, out: int, columns: int) -> int | None:
    """Lanes of a window group for this weight, 0 for plain 2:4, None if nothing sparse serves."""
    if pattern.is_dense or device.type != "cuda" or out * columns <= SMALLEST:
        return None
    from sparse_bitnet.kernels.matmul import cusparselt

    two_of_four = pattern.m % 4 == 0 and pattern.n <= 2
    if two_of_four and cusparselt.serves(device, out, columns):
        return 0
    group = windows.group_for(pattern, columns) or 0
    width = columns // group * (2 * group - 4) if group else 0
    return group if group and cusparselt.serves(device, out, width) else None


def lay_out(ternary: Tensor, group: int) -> Tensor:
    """Ternary int8 ``[out, in]`` that keeps its pattern → the library's compressed form.

    Args:
        group: of :func:`group_of`.
    """
    from sparse_bitnet.kernels.matmul import cusparselt
    from sparse_bitnet.kernels.ternarize import triton_windows

    with torch.cuda.device_of(ternary):
        return cusparselt.compress_kept(
            triton_windows.encode(ternary.contiguous(), group) if group else ternary
        )


def sparse_matmul(
    x_q: Tensor,
    x_scale: Tensor,
    ternary: Tensor,
    group: int,
    w_scale: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """``structured_matmul`` of a ternary weight that is laid out now, for this product alone."""
    if not torch.compiler.is_compiling():
        return structured_matmul(x_q, x_scale, lay_out(ternary, group), w_scale, bias)
    # What the library compresses to has a size that only it knows, so no operator returns it.
    y = torch.ops.sparse_bitnet.sparse_matmul(x_q, ternary, group, w_scale)
    y = y.float() * x_scale
    return (y if bias is None else y + bias.float()).to(torch.bfloat16)


def _sparse_matmul(x_q: Tensor, ternary: Tensor, group: int, w_scale: Tensor) -> Tensor:
    return structured_matmul(x_q, None, lay_out(ternary, group), w_scale)


def _fake_sparse_matmul(x_q: Tensor, ternary: Tensor, group: int, w_scale: Tensor) -> Tensor:
    return x_q.new_empty((*x_q.shape[:-1], w_scale.shape[0]), dtype=torch.bfloat16)


register(
    "sparse_matmul(Tensor x_q, Tensor ternary, int group, Tensor w_scale) -> Tensor",
    _sparse_matmul,
    _fake_sparse_matmul,
)


def choose(
    out: int,
    columns: int,
    pattern: Pattern,
    tokens: int,
    device: torch.device,
) -> Choice:
    """Dense or sparse for one weight; measured at the first call for a shape.

    Args:
        tokens: of one forward pass.
    """
    if device.type != "cuda" or not runs_triton(torch.empty(0, device=device)):
        return Choice(DENSE, "no sparse tensor cores")
    if out * columns <= SMALLEST:
        return Choice(DENSE, "too small to pay for a layout at every step")
    index = torch.cuda.current_device() if device.index is None else device.index
    key = f"training {autotune.bucket(tokens)}x{out}x{columns} {pattern}"
    memory = autotune.memory(index)
    if memory.get(key) is None:
        if not autotune.may_measure_now():
            return Choice(DENSE, "not measured")
        memory.put(key, _measure(out, columns, pattern, autotune.bucket(tokens), device))
    times = memory.get(key) or {}
    if SPARSE not in times:
        return Choice(DENSE, f"no sparse layout for {pattern} in a weight of this shape", times)
    layout = times["layout"]
    dense, sparse = times[DENSE], times[SPARSE]
    best = SPARSE if DRAW * (sparse + layout) < dense else DENSE
    why = f"dense {dense:.0f} µs, sparse {sparse:.0f} + {layout:.0f} µs of layout"
    return Choice(best, why, times)


@torch.no_grad()
def _measure(
    out: int, columns: int, pattern: Pattern, tokens: int, device: torch.device
) -> dict[str, float]:
    """Microseconds of a forward product by each path, the token scale left to fusion; of layout."""
    from sparse_bitnet.kernels.matmul import triton_dense

    with console.progress(f"measuring {tokens} tokens, [{out}, {columns}] {pattern}", 3) as task:
        weight = torch.randn(out, columns, device=device)
        ternary, scale = ternarize(weight, pattern)
        del weight
        rows = scale.expand(out).contiguous()
        x = torch.randn(tokens, columns, device=device).bfloat16()
        x_q, x_scale = quantize_fused(x)
        triton_dense.tune(x_q, x_scale.reshape(-1), ternary, rows)
        settle = autotune.SETTLE_SECONDS
        times = {DENSE: autotune.microseconds([partial(_dense, x, ternary, rows)], settle)}
        task.advance()
        group = group_of(pattern, device, out, columns)
        if group is None:
            return times
        compressed = lay_out(ternary, group)

        def sparse() -> Tensor:
            if group:
                _, x_q, _ = quantize_with_lifted(x, group)
            else:
                x_q, _ = quantize_fused(x)
            return structured_matmul(x_q, None, compressed, rows)

        try:
            sparse()  # lets the library search its algorithms outside a graph
        except BackendError:  # it has no such product for this GPU
            return times
        times[SPARSE] = autotune.microseconds([sparse], settle)
        task.advance()
        times["layout"] = autotune.microseconds([partial(lay_out, ternary, group)], settle)
        task.advance()
    return times


def _dense(x: Tensor, ternary: Tensor, w_scale: Tensor) -> Tensor:
    x_q, x_scale = quantize_fused(x)
    return ternary_matmul(x_q, x_scale, ternary, w_scale, None, torch.bfloat16)
