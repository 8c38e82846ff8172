"""Ternary weights: W ≈ γ·T with T in {−1, 0, 1} and γ the mean magnitude of W."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from sparse_bitnet.core.errors import WeightError
from sparse_bitnet.core.mask import nm_mask
from sparse_bitnet.core.method import Method
from sparse_bitnet.core.pattern import Pattern

SMALLEST_SCALE = 1e-5
LONGEST_ROW = 2**23
"""Sums of int8 times ternary codes of 0, 1 and 2, at most 2⁸ each, are in int32: 2³¹ / 2⁸."""


def absmean(
    weight: Tensor, shard_sizes: tuple[int, ...] = (), mask: Tensor | None = None
) -> Tensor:
    """γ: the mean of |W| over each logical matrix, at least 1e-5.

    Summed in float64, so that γ does not depend on the order of summation: a matrix cut over ranks,
    or reduced by another kernel, gets the same float32 value.

    Args:
        weight: ``[..., out, in]``; leading dimensions (experts) have a γ each.
        shard_sizes: the rows of each logical matrix fused into ``out`` (q, k, v), summing to
            ``out``; empty for one matrix.
        mask: take the mean over these weights only (the mask-then-quant ablation).

    Returns:
        float32 ``[..., max(1, shards)]``.

    Raises:
        WeightError: if the shard sizes do not sum to ``out``.
    """
    check_shard_sizes(shard_sizes, weight.shape[-2])
    return scale_of(scale_sums(weight, shard_sizes, mask))


def scale_sums(
    weight: Tensor, shard_sizes: tuple[int, ...] = (), mask: Tensor | None = None
) -> Tensor:
    """What γ is the quotient of: Σ|W| and how many, float64 ``[2, ..., max(1, shards)]``.

    Of a shard of the rows, each rank's are added; shard sizes may then have no rows here.
    """
    magnitude = weight.detach().abs()
    if mask is None:
        counts = [rows * weight.shape[-1] for rows in shard_sizes or weight.shape[-2:-1]]
        totals = _sums(magnitude, shard_sizes)
        return torch.stack([totals, totals.new_tensor(counts).expand_as(totals)])
    return torch.stack([_sums(magnitude * mask, shard_sizes), _sums(mask, shard_sizes)])


def scale_of(sums: Tensor) -> Tensor:
    """γ from :func:`scale_sums`, at least 1e-5: float32 ``[..., max(1, shards)]``."""
    totals, counts = sums
    return (totals / counts.clamp(min=1)).float().clamp(min=SMALLEST_SCALE)


def _sums(values: Tensor, shard_sizes: tuple[int, ...]) -> Tensor:
    parts = values.split(list(shard_sizes) or values.shape[-2], dim=-2)
    return torch.stack([part.sum(dim=(-2, -1), dtype=torch.float64) for part in parts], dim=-1)


def row_scale(scale: Tensor, shard_sizes: tuple[int, ...], out_features: int) -> Tensor:
    """γ of every output row: ``[..., shards]`` → ``[..., out]``."""
    parts = zip(scale.split(1, dim=-1), shard_sizes or (out_features,), strict=True)
    return torch.cat([part.expand(*part.shape[:-1], rows) for part, rows in parts], dim=-1)


def round_ternary(weight: Tensor, scale: Tensor) -> Tensor:
    """T = clip(round(W/γ), −1, 1) as int8; ``scale`` broadcasts against ``weight``.

    Source: absmean quantization, section 2 of arXiv 2402.17764. Rounds half to even, so |W| = γ/2
    becomes zero.
    """
    return (weight.detach().float() / scale).round_().clamp_(-1, 1).to(torch.int8)


def ternarize(
    weight: Tensor,
    pattern: Pattern,
    method: Method | None = None,
    shard_sizes: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Master weight → masked ternary weight and its scales: W ≈ γ·T.

    Quantize first with γ of the dense weight, then mask by the magnitude of the master weight, so
    every group of M holds at most N non-zeros.

    Args:
        weight: ``[..., out, in]``, float; three dimensions are ``[experts, out, in]``.
        pattern: N:M along ``in``.
        method: the published ablations; the published method when left out.
        shard_sizes: see :func:`absmean`.

    Returns:
        ``(ternary, scale)``: int8 of the weight's shape, float32 ``[..., max(1, shards)]``.

    Raises:
        PatternError: if M does not divide ``in``.
        WeightError: if the shard sizes do not sum to ``out``.

    Source: "quant-then-mask", section 3 of arXiv 2603.05168.
    """
    method = method or Method()
    first = method.order == "mask-then-quant"
    mask = method_mask(weight, pattern, method, shard_sizes) if first else None
    scale = absmean(weight, shard_sizes, mask)
    rows = row_scale(scale, shard_sizes, weight.shape[-2])
    return ternarize_with(weight, rows, pattern, method), scale


def ternarize_with(weight: Tensor, scale: Tensor, pattern: Pattern, method: Method) -> Tensor:
    """The ternary weight of :func:`ternarize` from γ of every row, float32 ``[..., out]``.

    A row needs no other row but for its γ, so the rows may be a shard of a matrix.

    Raises:
        PatternError: if M does not divide ``in``.
    """
    ternary = round_ternary(weight, scale.unsqueeze(-1))
    if pattern.is_dense:
        return ternary
    return ternary * nm_mask(ternary if method.mask_source == "quantized" else weight, pattern)


def method_mask(
    weight: Tensor, pattern: Pattern, method: Method, shard_sizes: tuple[int, ...] = ()
) -> Tensor | None:
    """The mask that :func:`ternarize` applies, boolean of the weight's shape; None if dense.

    Raises:
        PatternError: if M does not divide ``in``.
    """
    if pattern.is_dense:
        return None
    if method.mask_source == "quantized":
        rows = row_scale(absmean(weight, shard_sizes), shard_sizes, weight.shape[-2]).unsqueeze(-1)
        return nm_mask(round_ternary(weight, rows), pattern)
    return nm_mask(weight, pattern)


def zero_matrices(weight: Tensor, shard_sizes: tuple[int, ...] = ()) -> list[str]:
    """Logical matrices whose ternary weights are all zero, as indices to the weight's name.

    That is |W| ≤ γ/2 everywhere, which only the smallest γ allows. One pass, one synchronisation.

    Args:
        weight: ``[..., out, in]``, master or ternary.
        shard_sizes: see :func:`absmean`.

    Returns:
        ``[""]`` for the one matrix; ``["[3]"]`` for an expert, ``["[64:96]"]`` for fused rows.
    """
    rows = shard_sizes or weight.shape[-2:-1]
    parts = weight.detach().split(list(rows), dim=-2)
    zero = torch.stack([p.abs().amax((-2, -1)) <= SMALLEST_SCALE / 2 for p in parts], dim=-1)
    if not bool(zero.any()):
        return []
    ends = list(accumulate(rows))
    names = []
    for *expert, part in zero.nonzero().tolist():
        index = [*map(str, expert)]
        if shard_sizes:
            index.append(f"{ends[part] - rows[part]}:{ends[part]}")
        names.append(f"[{', '.join(index)}]" if index else "")
    return names


def check_shard_sizes(
    shard_sizes: tuple[int, ...], out_features: int, where: str = "weight"
) -> None:
    """Refuse shard sizes that do not cut ``out`` into logical matrices.

    Raises:
        WeightError: naming ``where``, the shard sizes and the rows.
    """
    if shard_sizes and (min(shard_sizes) < 1 or sum(shard_sizes) != out_features):
        raise WeightError(
            f"{where}: shard sizes {shard_sizes} must be positive and sum to its "
            f"{out_features} rows"
        )


def check_row(in_features: int, where: str = "weight") -> None:
    """Refuse rows so long that a sum of int8 activations times ternary weights may not fit int32.

    Raises:
        WeightError: naming ``where`` and the length.
    """
    if in_features >= LONGEST_ROW:
        raise WeightError(
            f"{where}: {in_features} input features cannot be summed in 32 bits (the limit is "
            f"{LONGEST_ROW - 1}); leave this layer in floating point"
        )


def check_finite(weight: Tensor, where: str = "weight") -> None:
    """Refuse NaN and infinity. Costs a device synchronisation: only for input from outside.

    Raises:
        WeightError: naming ``where`` and how many values are not finite.
    """
    if weight.numel() == 0:
        return
    # The extremes carry any NaN or infinity, and need one pass and no memory.
    if all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(weight.detach())):
        return
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise WeightError(
            f"{where}: {bad} of {weight.numel()} values are NaN or infinite; "
            "the weight is damaged or training diverged, take an earlier checkpoint"
        )
