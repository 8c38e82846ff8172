"""Master weight → masked ternary weight and scales."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bitnet.core.method import Method
from sparse_bitnet.core.pattern import Pattern
from sparse_bitnet.core.ternary import check_segments
from sparse_bitnet.kernels.library import register
from sparse_bitnet.kernels.platform import runs_triton
from sparse_bitnet.kernels.ternarize import cpu, reference

__all__ = ["ternarize", "ternarize_into"]

PUBLISHED = Method()


def ternarize(
    weight: Tensor,
    pattern: Pattern,
    method: Method | None = None,
    segments: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Masked ternary weight and γ; arguments, results and errors of ``core.ternarize``.

    Two Triton passes on CUDA and, for large matrices, chunks of rows on the CPU for the published
    method; the reference for its ablations and elsewhere. All give the same values.
    """
    method = method or PUBLISHED
    if _published(method) and weight.ndim >= 2 and cpu.serves(weight):
        return cpu.ternarize(weight, pattern, segments)
    if not (_published(method) and runs_triton(weight) and weight.ndim >= 2):
        return reference.ternarize(weight, pattern, method, segments)
    pattern.check_divides(weight.shape[-1])
    check_segments(segments, weight.shape[-2])
    ternary, scale = torch.ops.sparse_bitnet.ternarize(
        weight.detach(), pattern.n, pattern.m, list(segments)
    )
    return ternary, scale


def ternarize_into(
    out: Tensor,
    weight: Tensor,
    pattern: Pattern,
    method: Method | None = None,
    segments: tuple[int, ...] = (),
) -> Tensor:
    """The same, written over ``out`` (int8 of the weight's shape); returns γ.

    For a weight that is derived again and again: Triton spares the copy. Not for traced code.
    """
    method = method or PUBLISHED
    direct = runs_triton(weight) and out.is_contiguous() and out.device == weight.device
    if not (direct and _published(method) and weight.ndim >= 2):
        ternary, scale = ternarize(weight, pattern, method, segments)
        out.copy_(ternary)
        return scale
    from sparse_bitnet.kernels.ternarize import triton

    pattern.check_divides(weight.shape[-1])
    check_segments(segments, weight.shape[-2])
    with torch.cuda.device_of(weight):
        _, scale = triton.ternarize(weight.detach(), pattern, segments, out)
    torch.autograd.graph.increment_version(out)  # autograd cannot see what Triton writes
    return scale


def _published(method: Method) -> bool:
    return method.order == PUBLISHED.order and method.mask_source == PUBLISHED.mask_source


def _cuda(weight: Tensor, n: int, m: int, segments: list[int]) -> tuple[Tensor, Tensor]:
    from sparse_bitnet.kernels.ternarize import triton

    return triton.ternarize(weight, Pattern(n, m), tuple(segments))


def _fake(weight: Tensor, n: int, m: int, segments: list[int]) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(weight.shape, dtype=torch.int8, device=weight.device),
        weight.new_empty((*weight.shape[:-2], max(1, len(segments))), dtype=torch.float32),
    )


register("ternarize(Tensor weight, int n, int m, int[] segments) -> (Tensor, Tensor)", _cuda, _fake)
