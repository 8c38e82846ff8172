"""2:4 sparsity: two kept lanes of every four, as values and two-bit lane numbers.

This is the arithmetic content of what sparse tensor cores read: half the values, and for each the
lane (0 … 3) it came from. How a library interleaves the two is its own affair.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bitnet.core.errors import PackedFormatError, PatternError, WeightError
from sparse_bitnet.core.mask import worst_group
from sparse_bitnet.formats.rows import chunks

GROUP = 4
KEPT = 2


def fits(ternary: Tensor) -> bool:
    """Whether every aligned four lanes of int8 ``[..., in]`` hold at most two non-zeros."""
    return ternary.shape[-1] % GROUP == 0 and all(
        worst_group(rows, GROUP) <= KEPT for _, rows in chunks(ternary)
    )


def pack(ternary: Tensor) -> tuple[Tensor, Tensor]:
    """``[..., in]`` → values ``[..., in/2]`` and lanes ``[..., in/8]``.

    Args:
        ternary: int8 with at most two non-zeros in every aligned four lanes; 8 divides ``in``.

    Returns:
        ``(values, lanes)``: int8 values in lane order, and uint8 with the lane numbers of two
        fours in a byte, lowest bits first. A four with fewer than two non-zeros names zeros, the
        lowest free lanes first, so that the two lanes always differ and ascend.

    Raises:
        PatternError: if 8 does not divide ``in``.
        WeightError: if a four holds more than two non-zeros; none is ever dropped.
    """
    if ternary.shape[-1] % (2 * GROUP):
        raise PatternError(
            f"2:4: a row of {ternary.shape[-1]} is not a multiple of 8, which packing needs; "
            "a pattern or a rule for this module has to leave 2:4"
        )
    worst = worst_group(ternary, GROUP)
    if worst > KEPT:
        raise WeightError(
            f"2:4: {worst} non-zeros in four lanes, at most 2 fit; the weight does not keep to "
            "2:4, mask it before packing"
        )
    fours = ternary.unflatten(-1, (-1, GROUP))
    # Stable: non-zeros first, then zeros, each by lane; then the two chosen in lane order.
    chosen = (fours == 0).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :KEPT]
    chosen = chosen.sort(dim=-1).values
    values = fours.gather(-1, chosen).flatten(-2)
    bits = chosen.flatten(-2).unflatten(-1, (-1, 4)).to(torch.uint8)
    lanes = bits[..., 0] | bits[..., 1] << 2 | bits[..., 2] << 4 | bits[..., 3] << 6
    return values, lanes


def unpack(values: Tensor, lanes: Tensor) -> Tensor:
    """The inverse of :func:`pack`.

    Raises:
        PackedFormatError: if the shapes disagree or a four names one lane twice.
    """
    if values.shape[-1] != 4 * lanes.shape[-1] or values.shape[:-1] != lanes.shape[:-1]:
        raise PackedFormatError(
            f"2:4: values {tuple(values.shape)} and lanes {tuple(lanes.shape)} do not belong "
            "together; the file is damaged, pack the model again"
        )
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=lanes.device)
    chosen = ((lanes.unsqueeze(-1) >> shifts) & 3).flatten(-2).unflatten(-1, (-1, KEPT)).long()
    if bool((chosen[..., 0] >= chosen[..., 1]).any()):
        raise PackedFormatError(
            "2:4: a four names its lanes twice or out of order; the file is damaged, pack the "
            "model again"
        )
    pairs = values.unflatten(-1, (-1, KEPT))
    fours = torch.zeros((*pairs.shape[:-1], GROUP), dtype=values.dtype, device=values.device)
    return fours.scatter_(-1, chosen, pairs).flatten(-2)
