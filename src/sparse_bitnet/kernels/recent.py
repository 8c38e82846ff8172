"""Things made for shapes, of which only the last ones used are kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """At most ``most`` values, by key; the one not used for longest goes. For several threads."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: OrderedDict[Key, Value] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Key) -> Value | None:
        """The value of a key, which counts as a use, or None."""
        with self._lock:
            value = self._values.get(key)
            if value is not None:
                self._values.move_to_end(key)
            return value

    def put(self, key: Key, value: Value) -> None:
        """Keep a value."""
        with self._lock:
            old = self._values.pop(key, None)
            self._values[key] = value
            if len(self._values) > self._most:
                _, old = self._values.popitem(last=False)
        del old  # outside the lock: its end may take time

    def __len__(self) -> int:
        return len(self._values)
