"""What the formats share: chunked processing of rows, and checks of their values.

On the CPU a chunk fits the cache and is below the size from which PyTorch hands an operation to its
threads, so the handful of passes that a format takes over its bytes cost neither memory traffic nor
waiting. Packing a large matrix needs little more memory than its result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_bitnet.core import PackedFormatError, WeightError

CHUNK_BYTES = 2**18  # fewer let a large model wait for Python, more for memory
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


@dataclass(frozen=True)
class Storage:
    """One way to keep ternary rows ``[..., in]`` as bytes, of ``per_byte`` weights each."""

    name: str  # as written into a packed model's configuration
    per_byte: int
    pack_rows: Callable[[Tensor], Tensor]  # int8 ``[rows, in]`` → uint8 ``[rows, bytes]``
    unpack_rows: Callable[[Tensor, int], Tensor]  # ``(packed, in)``, the inverse
    # ``(packed, in)`` → boolean of its shape, True where packing writes no such
    wrong_bytes: Callable[[Tensor, int], Tensor]

    def packed_length(self, length: int) -> int:
        """Bytes of a row of ``length`` weights."""
        return -(-length // self.per_byte)

    def pack(self, ternary: Tensor, where: str = "weight") -> Tensor:
        """int8 ``[..., in]`` with values in {−1, 0, 1} → uint8 ``[..., packed_length(in)]``.

        Raises:
            WeightError: if the tensor is not int8 or holds another value.
        """
        check_ternary(ternary, where)
        length = self.packed_length(ternary.shape[-1])
        out = ternary.new_empty((*ternary.shape[:-1], length), dtype=torch.uint8)
        return _map_rows(self.pack_rows, ternary, out)

    def unpack(self, packed: Tensor, length: int, where: str = "weight") -> Tensor:
        """The inverse of :meth:`pack`, int8 ``[..., length]``.

        Raises:
            PackedFormatError: as :meth:`check`.
        """
        self.check(packed, length, where)
        out = packed.new_empty((*packed.shape[:-1], length), dtype=torch.int8)
        return _map_rows(lambda rows: self.unpack_rows(rows, length), packed, out)

    def check(self, packed: Tensor, length: int, where: str = "weight") -> None:
        """Refuse bytes that :meth:`pack` never writes for rows of ``length`` weights.

        Raises:
            PackedFormatError: for another dtype or row length, or a wrong byte; naming ``where``,
                row and byte.
        """
        expected = self.packed_length(length)
        check_bytes(packed, length, expected, lambda rows: self.wrong_bytes(rows, length), where)


def _map_rows(function: Callable[[Tensor], Tensor], source: Tensor, out: Tensor) -> Tensor:
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
                "for no ternary weights; the file was edited or damaged, get or pack it again"
            )
