"""The published method by the compiled CPU library: two passes over the weight, exact.

In plain PyTorch the mask alone takes M passes through memory and costs more than the product that
follows; a training step derives its weights in every forward, so that would be felt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bitnet.core.pattern import Pattern
from sparse_bitnet.core.ternary import SMALLEST_SCALE, check_shard_sizes, row_scale
from sparse_bitnet.kernels import native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def serves(weight: Tensor) -> bool:
    """On the CPU, of a dtype no wider than float32, and the library is there."""
    return (
        weight.device.type == "cpu" and weight.dtype in DTYPES and native.path() != native.REFERENCE
    )


def ternarize(
    weight: Tensor, pattern: Pattern, shard_sizes: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    """The published method; arguments, results and errors of ``core.ternarize``."""
    pattern.check_divides(weight.shape[-1])
    check_shard_sizes(shard_sizes, weight.shape[-2])
    *experts, out, columns = weight.shape
    rows = weight.detach().float().reshape(-1, columns).contiguous()
    lengths = shard_sizes or (out,)
    sums = native.row_sums(rows).view(*experts, out).split(lengths, dim=-1)
    means = [s.sum(-1) / max(1, n * columns) for s, n in zip(sums, lengths, strict=True)]
    scale = torch.stack(means, dim=-1).float().clamp(min=SMALLEST_SCALE)
    return ternarize_with(weight, row_scale(scale, shard_sizes, out), pattern), scale


def ternarize_with(weight: Tensor, scale: Tensor, pattern: Pattern) -> Tensor:
    """The published method with γ of every row given, as ``core.ternarize_with``."""
    pattern.check_divides(weight.shape[-1])
    rows = weight.detach().float().reshape(-1, weight.shape[-1]).contiguous()
    scales = scale.reshape(-1).contiguous()
    return native.ternarize_rows(rows, scales, pattern.n, pattern.m).view(weight.shape)
