"""Weights at rest: one file a format, each a pure pack and unpack pair, lossless."""

from __future__ import annotations

from typing import Literal, get_args

from sparse_bitnet.core import ConfigError
from sparse_bitnet.formats import trits, two_bit
from sparse_bitnet.formats.rows import Storage

StorageName = Literal["two-bit", "trits"]
STORAGES = {form.STORAGE.name: form.STORAGE for form in (two_bit, trits)}


def storage(name: str) -> Storage:
    """The storage format of that name.

    Raises:
        ConfigError: for an unknown name.
    """
    if name not in STORAGES:
        raise ConfigError(f"storage is {name!r}; choose among {get_args(StorageName)}")
    return STORAGES[name]


__all__ = ["STORAGES", "Storage", "StorageName", "storage"]
