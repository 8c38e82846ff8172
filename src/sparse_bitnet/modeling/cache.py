"""Key-value caches: one that grows without copying, one of fixed size for CUDA graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

SPARE_TOKENS = 256
"""Room that a growing cache gets beyond its tokens, at least."""


class KeyValueCache(DynamicCache):
    """transformers' dynamic cache, whose layers of full attention keep room for tokens to come.

    Layers with a sliding window are transformers' own.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config=config)
        self.layers = [
            GrowingLayer() if type(layer) is DynamicLayer else layer for layer in self.layers
        ]


class GrowingLayer(DynamicLayer):
    """Keys and values ``[batch, heads, tokens, head_dim]``: the front of longer buffers.

    ``keys`` and ``values`` are made when they are read: a token that the compiled library takes
    through all layers reads none. transformers' methods may replace them (to crop or reorder). What
    is no front of the buffers is copied into new ones before the next token is written.
    """

    def __init__(self) -> None:
        self._buffers: list[Any] = [None, None]
        self._lengths = [0, 0]
        super().__init__()

    @property
    def keys(self) -> Any:
        return self._front(0)

    @keys.setter
    def keys(self, states: Tensor | None) -> None:
        self._replace(0, states)

    @property
    def values(self) -> Any:
        return self._front(1)

    @values.setter
    def values(self, states: Tensor | None) -> None:
        self._replace(1, states)

    def _front(self, index: int) -> Any:
        whole, length = self._buffers[index], self._lengths[index]
        return whole if whole is None or whole.ndim < 4 else whole.narrow(2, 0, length)

    def _replace(self, index: int, states: Tensor | None) -> None:
        whole = self._buffers[index]
        self._lengths[index] = 0 if states is None or states.ndim < 4 else states.shape[2]
        if states is None or whole is None or not _is_front(states, whole):
            self._buffers[index] = states

    def get_seq_length(self) -> int:
        return self._lengths[0] if self.is_initialized else 0

    def buffer_shape(self) -> Any:
        """Of the keys, room for tokens to come included."""
        return self._buffers[0].shape

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append ``[batch, heads, new, head_dim]``; returns all keys and values."""
        if key_states.requires_grad or torch.compiler.is_compiling():
            both: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return both
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._lengths[0] == 0:  # transformers' empty keys have no shape
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        seen, new = self._lengths[0], key_states.shape[2]
        for buffer, states in zip(self.reserve(new), (key_states, value_states), strict=True):
            buffer[:, :, seen : seen + new] = states
        self.extend(new)
        return self.keys, self.values

    def reserve(self, new: int) -> tuple[Tensor, Tensor]:
        """Buffers that begin with the present tokens and have room for ``new`` more."""
        anything = torch.is_inference_mode_enabled()
        for index, whole in enumerate(self._buffers):
            may_write = anything or not whole.is_inference()
            if whole.shape[2] < self._lengths[index] + new or not may_write:
                self._buffers[index] = _with_room(self._front(index), new)
        return self._buffers[0], self._buffers[1]

    def extend(self, new: int) -> None:
        """Count ``new`` tokens that were written into the buffers of :meth:`reserve`."""
        self._lengths = [length + new for length in self._lengths]


def _is_front(front: Tensor, whole: Tensor) -> bool:
    """True if one tensor is the other's beginning."""
    return (
        not torch.compiler.is_compiling()  # which knows no addresses
        and front.data_ptr() == whole.data_ptr()
        and front.stride() == whole.stride()
        and front.shape[:2] == whole.shape[:2]
        and front.shape[2] <= whole.shape[2]
    )


def _with_room(front: Tensor, new: int) -> Tensor:
    batch, heads, seen, width = front.shape
    length = seen + new
    # Zeros: a graph reads the spare room too, with probabilities of zero, so it has to be finite.
    whole = front.new_zeros(batch, heads, length + max(SPARE_TOKENS, length // 2), width)
    whole[:, :, :seen] = front
    return whole


class StaticKeyValueCache(Cache):
    """Keys and values of a fixed number of tokens, written in place at one position of all layers.

    For CUDA graphs that are replayed: memory never moves, and the position is a tensor, which the
    decoder advances once a pass. Without sliding windows.

    Args:
        config: of the model.
        batch: sequences.
        length: tokens that fit.
        dtype, device: of keys and values.

    Attributes:
        length: tokens that fit.
        position: int64 ``[]``, tokens seen so far; whoever writes another number rewinds the cache.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        batch: int,
        length: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.length = length
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        heads = config.num_key_value_heads
        width = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        shape = (batch, heads, length, width)
        layers: list[Any] = []
        for _ in range(config.num_hidden_layers):
            keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
            layers.append(FixedLayer(keys, values, self.position))
        super().__init__(layers=layers)

    def advance(self, new: int) -> None:
        """Count ``new`` tokens that all layers have written."""
        self.position.add_(new)


class FixedLayer(StaticLayer):
    """A layer of :class:`StaticKeyValueCache`: transformers' static one with a shared position."""

    keys: Any
    values: Any

    def __init__(self, keys: Tensor, values: Tensor, position: Tensor) -> None:
        super().__init__(max_cache_len=keys.shape[2])
        self.keys, self.values, self.cumulative_length = keys, values, position
        self.dtype, self.device, self.batch_size = keys.dtype, keys.device, keys.shape[0]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write ``[batch, heads, new, head_dim]`` at the position; returns all keys and values."""
        new = torch.arange(key_states.shape[2], device=key_states.device)
        self.keys.index_copy_(2, new + self.cumulative_length, key_states)
        self.values.index_copy_(2, new + self.cumulative_length, value_states)
        return self.keys, self.values
