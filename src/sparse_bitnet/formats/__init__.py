"""Weights at rest: one file a format, each a pure pack and unpack pair, lossless."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from sparse_bitnet.core import ConfigError
from sparse_bitnet.formats import trits, two_bit

StorageName = Literal["two-bit", "trits"]


@dataclass(frozen=True)
class Storage:
    """One way to keep ternary rows ``[..., in]`` as bytes ``[..., packed_length(in)]``.

    Attributes:
        name: as written into a packed model's configuration.
        packed_length: bytes of a row of so many weights.
        pack: ``(ternary, where)`` → uint8; WeightError for what is not ternary.
        unpack: ``(packed, length, where)`` → int8; PackedFormatError for bytes never written.
        check: ``(packed, length, where)``: what ``unpack`` refuses, without unpacking.
    """

    name: str
    packed_length: Callable[[int], int]
    pack: Callable[[Tensor, str], Tensor]
    unpack: Callable[[Tensor, int, str], Tensor]
    check: Callable[[Tensor, int, str], None]


STORAGES = {
    name: Storage(name, form.packed_length, form.pack, form.unpack, form.check)
    for name, form in (("two-bit", two_bit), ("trits", trits))
}


def storage(name: str) -> Storage:
    """The storage format of that name.

    Raises:
        ConfigError: for an unknown name.
    """
    if name not in STORAGES:
        raise ConfigError(f"storage is {name!r}; choose among {get_args(StorageName)}")
    return STORAGES[name]


__all__ = ["STORAGES", "Storage", "StorageName", "storage"]
