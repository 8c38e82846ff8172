"""A ternary weight in the layouts that the backends of its device read."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_bitnet.core.pattern import DENSE, Pattern
from sparse_bitnet.formats import sparse24, windows
from sparse_bitnet.kernels import native
from sparse_bitnet.kernels.matmul import cpu
from sparse_bitnet.kernels.platform import runs_triton

MOST_COPIES = 64


@dataclass(frozen=True)
class TernaryWeight:
    """One ternary weight on one device, in the layouts its backends read; see :func:`prepare`."""

    pattern: Pattern
    w_scale: Tensor
    out_features: int
    in_features: int
    rows: Tensor | None
    """int8 ``[out, in]``, where a backend reads it so: everywhere but in the CPU kernel."""
    packed: Tensor | None = None
    layout: str = "two-bit"
    """Of ``packed`` on a CPU: two-bit, or six-bit."""
    structured: Tensor | None = None
    group: int = 0
    """Lanes of a window group; 0 if ``structured`` is plain 2:4."""

    @property
    def dense(self) -> Tensor:
        """int8 ``[out, in]``; unpacked at every call if it is not kept."""
        if self.rows is not None:
            return self.rows
        assert self.packed is not None
        return cpu.unpack(self.packed, self.layout, self.in_features)

    @property
    def device(self) -> torch.device:
        return self.w_scale.device

    @property
    def sparse_backend(self) -> str | None:
        if self.structured is None:
            return None
        return "windows" if self.group else "2:4"


def prepare(
    ternary: Tensor,
    w_scale: Tensor,
    pattern: Pattern = DENSE,
    stored: Tensor | None = None,
) -> TernaryWeight:
    """Lay out a ternary weight for the device it is on.

    Args:
        ternary: int8 ``[out, in]`` with values in {−1, 0, 1}.
        w_scale: float32 ``[out]``, γ of every row.
        pattern: what the weight keeps to; decides whether windows are built.
        stored: the same weight as bytes of ``formats.two_bit``, if the caller has them: the CPU
            kernel reads them where they are.

    Raises:
        WeightError: if the weight breaks its pattern and so cannot be written as windows.
    """
    ternary, w_scale = ternary.contiguous(), w_scale.contiguous()
    out, columns = ternary.shape
    if not runs_triton(ternary):
        if ternary.device.type != "cpu" or native.path() == native.REFERENCE or not columns:
            return TernaryWeight(pattern, w_scale, out, columns, ternary)
        laid_out, layout = cpu.lay_out(ternary, stored)
        return TernaryWeight(pattern, w_scale, out, columns, None, laid_out, layout)
    from sparse_bitnet.kernels.matmul import cusparselt, triton_packed

    packed = triton_packed.pack_rows(ternary) if columns < triton_packed.LONGEST_ROW else None
    structured, group = None, 0
    if not pattern.is_dense:
        if sparse24.fits(ternary) and cusparselt.serves(ternary.device, out, columns):
            structured = cusparselt.compress(ternary)
        else:
            group = windows.group_for(pattern, columns) or 0
            lifted = columns // group * (2 * group - 4) if group else 0
            if group and cusparselt.serves(ternary.device, out, lifted):
                structured = cusparselt.compress(windows.encode(ternary, group))
            else:
                group = 0
    return TernaryWeight(
        pattern, w_scale, out, columns, ternary, packed, structured=structured, group=group
    )


def copies(weight: TernaryWeight) -> list[TernaryWeight]:
    """The weight several times over, so that together the copies overflow the L2 cache twice."""
    cache_bytes = torch.cuda.get_device_properties(weight.device).L2_cache_size
    smallest = weight.dense.numel() // 4
    count = min(MOST_COPIES, max(1, 2 * cache_bytes // max(1, smallest)))

    def copy(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.clone()

    return [weight] + [
        replace(
            weight,
            rows=copy(weight.rows),
            packed=copy(weight.packed),
            structured=copy(weight.structured),
        )
        for _ in range(count - 1)
    ]
