"""What the formats share: chunked processing of rows, and checks of their values.

On the CPU a chunk fits the cache and is below the size from which PyTorch hands an operation to its
threads, so the handful of passes that a format takes over its bytes cost neither memory traffic nor
waiting. Packing a large matrix needs little more memory than its result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sparse_bitnet.core import PackedFormatError, WeightError

CHUNK_BYTES = 2**15
DEVICE_CHUNK_BYTES = 2**26


def chunks(tensor: Tensor, widest: int = 0) -> Iterator[tuple[int, Tensor]]:
    """Yield ``(first row, rows)`` over ``[..., n]`` seen as ``[rows, n]``.

    ``widest`` is the longest row that is made of each, if longer than n.
    """
    if tensor.numel() == 0:
        return
    rows = tensor.reshape(-1, tensor.shape[-1])
    size = CHUNK_BYTES if tensor.device.type == "cpu" else DEVICE_CHUNK_BYTES
    step = max(1, size // max(widest, rows.shape[-1]))
    for first in range(0, rows.shape[0], step):
        yield first, rows[first : first + step]


def map_rows(function: Callable[[Tensor], Tensor], source: Tensor, out: Tensor) -> Tensor:
    """Fill ``out`` ``[..., m]`` with ``function(rows of source)``; both have the same rows."""
    rows = out.view(-1, out.shape[-1]) if out.numel() else out
    for first, part in chunks(source, out.shape[-1]):
        rows[first : first + part.shape[0]] = function(part)
    return out


def check_ternary(weight: Tensor, where: str) -> None:
    """Refuse what is not int8 with values in {−1, 0, 1}.

    Raises:
        WeightError: naming ``where`` and the first wrong value.
    """
    if weight.dtype != torch.int8 or weight.dim() == 0:
        raise WeightError(
            f"{where}: packing needs an int8 tensor [..., in], not {weight.dtype} of shape "
            f"{tuple(weight.shape)}; ternarize the weight first"
        )
    if weight.numel() == 0:
        return
    low, high = torch.aminmax(weight)
    if low >= -1 and high <= 1:
        return
    for first, rows in chunks(weight):
        wrong = (rows < -1) | (rows > 1)
        if wrong.any():
            row, lane = wrong.nonzero()[0].tolist()
            raise WeightError(
                f"{where}: row {first + row} holds {int(rows[row, lane])} at input {lane}, which "
                "is not ternary; ternarize the weight first"
            )


def check_bytes(
    packed: Tensor, length: int, expected: int, bad: Callable[[Tensor], Tensor], where: str
) -> None:
    """Refuse bytes that no weight of ``length`` packs to.

    Args:
        packed: uint8 ``[..., expected]``.
        length: unpacked weights a row.
        expected: bytes a row.
        bad: ``[rows, expected]`` → boolean of that shape, True where a byte is wrong.

    Raises:
        PackedFormatError: naming ``where``, and the row and byte.
    """
    if packed.dtype != torch.uint8 or packed.dim() == 0 or packed.shape[-1] != expected:
        raise PackedFormatError(
            f"{where}: {length} weights a row are stored in uint8 [..., {expected}], not in "
            f"{packed.dtype} {list(packed.shape)}; the file is damaged or foreign, pack again"
        )
    for first, rows in chunks(packed):
        wrong = bad(rows)
        if wrong.any():
            row, byte = wrong.nonzero()[0].tolist()
            raise PackedFormatError(
                f"{where}: row {first + row}, byte {byte} is {int(rows[row, byte])}, which stands "
                "for no ternary weights; the file was edited or damaged, pack the model again"
            )
