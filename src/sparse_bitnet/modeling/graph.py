"""Tokens of several sequences from embedding to logits as one CUDA graph, on a GPU.

Module by module, a token of a 7B model launches some seven hundred kernels of a few microseconds
from Python, which takes 30 to 50 ms; as one graph it takes 3. What a graph replays is fixed, so
what changes from token to token lies in tensors of its own that are written before:

    ids, positions ──────────────┐
    places of keys and values ───┼──▶ embedding ─ layers ─ norm ─ head ──▶ logits
    which keys count ────────────┘           │
                                  keys and values: the cache's own memory

A graph is recorded for the addresses of a cache (and of the weights), the number of sequences and
how many keys there is room for. It is recorded when these are met for the second time in a row,
because some caches move with every token (beam search).

Results are those of the modules up to the order of float sums.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparse_bitnet.modeling.cache import GrowingLayer
from sparse_bitnet.modeling.layers import FULL
from sparse_bitnet.modeling.reads import Reads, rotates_alone

if TYPE_CHECKING:
    from sparse_bitnet.modeling.decoder import Decoder

DEVICE = "cuda"
MOST_GRAPHS = 8
"""The ones that were not used for longest are dropped; each holds the activations of a pass."""


class GraphStep:
    """The recorded passes of a decoder. Calls of several threads take turns."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._forget()

    def _forget(self) -> None:
        self._reads = Reads(self._decoder)
        self._graphs: dict[tuple[Any, ...], _Recorded] = {}
        self._met: tuple[Any, ...] | None = None
        self._turn = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"_decoder": self._decoder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __call__(
        self,
        head: nn.Module,
        input_ids: Any,
        inputs_embeds: Any,
        mask: Any,
        position_ids: Any,
        cache: Any,
        options: dict[str, Any],
    ) -> Tensor | None:
        """Logits of one token of each sequence, which the cache grows by; arguments and result as
        of :class:`sparse_bitnet.modeling.native.NativeStep`, of which this takes
        :class:`KeyValueCache`.

        None where no graph serves: other devices and caches, embeddings, several tokens of a
        sequence, sliding windows, autocast, gradients, compilation; and where what it would be
        recorded for is new. Then nothing has changed.
        """
        if (
            torch.compiler.is_compiling()
            or input_ids is None
            or inputs_embeds is not None
            or input_ids.device.type != DEVICE
            or input_ids.shape[1] != 1
            or options.get("cache") is not None
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled(DEVICE)
            or self._decoder.config._attn_implementation != "sdpa"
            or not rotates_alone(self._decoder)
        ):
            return None
        layers = getattr(cache, "layers", [])
        buffers = self._buffers(layers, input_ids.shape[0])
        if buffers is None:
            return None
        seen = layers[0].get_seq_length()
        if mask is not None and not (
            isinstance(mask, Tensor) and mask.shape == (input_ids.shape[0], seen + 1)
        ):
            return None
        with self._turn:
            recorded = self._recorded(head, buffers, input_ids)
            if recorded is None:
                return None
            logits = recorded(input_ids, position_ids, mask, seen)
        for one in layers:
            one.extend(1)
        return logits

    def _buffers(self, layers: Any, batch: int) -> list[tuple[Tensor, Tensor]] | None:
        """Keys and values with room for a token more, if the cache is one that graphs serve."""
        own: Any = self._decoder.layers
        if (
            len(layers) != len(own)
            or not all(one.is_packed and one.self_attn.sliding_window is None for one in own)
            or not all(isinstance(one, GrowingLayer) and one.is_initialized for one in layers)
        ):
            return None
        seen, shape = layers[0].get_seq_length(), layers[0].buffer_shape()
        if shape[0] != batch or any(
            one.get_seq_length() != seen or one.buffer_shape() != shape for one in layers
        ):
            return None
        return [one.reserve(1) for one in layers]

    def _recorded(
        self, head: nn.Module, buffers: list[tuple[Tensor, Tensor]], ids: Tensor
    ) -> _Recorded | None:
        """The graph for these addresses; None if they are met for the first time in a row."""
        decoder: Any = self._decoder
        modules = decoder.embed_tokens, decoder.rotary_emb, head
        others = [one for module in modules for one in (*module.parameters(), *module.buffers())]
        others += [one for both in buffers for one in both]
        key = (ids.shape[0], *buffers[0][0].shape, *self._reads.now(others))
        recorded = self._graphs.pop(key, None)
        if recorded is None:
            if key != self._met:
                self._met = key
                return None
            recorded = _Recorded(decoder, head, buffers, ids, self._reads.weights)
        self._graphs[key] = recorded  # the latest is the last
        while len(self._graphs) > MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        return recorded


class _Recorded:
    """A pass over one cache's memory, recorded.

    It owns its inputs and keeps the weights. Keys and values belong to the cache, which is all that
    keeps them: a graph of a cache that is gone is not asked for again, unless another cache has
    been given the same memory.
    """

    def __init__(
        self,
        decoder: Any,
        head: nn.Module,
        buffers: list[tuple[Tensor, Tensor]],
        ids: Tensor,
        weights: list[Any],
    ) -> None:
        batch, length = ids.shape[0], buffers[0][0].shape[2]
        self._weights = weights
        with torch.inference_mode(False), torch.device(ids.device):  # written in any mode
            self._ids, self._positions = torch.zeros(2, batch, 1, dtype=torch.int64).unbind()
            self._kept = torch.ones(batch, length, dtype=torch.bool)
            self._numbers = torch.arange(length)
            # Recording runs the pass, which writes there: behind all tokens.
            self._place = torch.tensor([length - 1])

        def step() -> Tensor:
            counts = (self._numbers <= self._place) & self._kept
            hidden = decoder(
                input_ids=self._ids,
                attention_mask={FULL: counts[:, None, None]},
                position_ids=self._positions,
                past_key_values=_Places(buffers, self._place),
            ).last_hidden_state
            logits: Tensor = head(hidden)
            return logits

        self._replay = record(step)

    def __call__(
        self, ids: Tensor, positions: Tensor | None, mask: Tensor | None, seen: int
    ) -> Tensor:
        """Logits ``[batch, 1, vocabulary]`` of tokens ``[batch, 1]`` behind ``seen`` others."""

        def fill() -> None:
            self._ids.copy_(ids)
            self._place.fill_(seen)
            if positions is None:
                self._positions.fill_(seen)
            else:
                self._positions.copy_(positions)
            if mask is None:
                self._kept.fill_(True)
            else:
                self._kept[:, : seen + 1].copy_(mask)

        return self._replay(fill)


class _Places:
    """A cache for the decoder whose layers write at one place of given buffers."""

    offloading = False

    def __init__(self, buffers: list[tuple[Tensor, Tensor]], place: Tensor) -> None:
        self.layers = [_Place(keys, values, place) for keys, values in buffers]


class _Place:
    def __init__(self, keys: Tensor, values: Tensor, place: Tensor) -> None:
        self._keys, self._values, self._place = keys, values, place

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write ``[batch, heads, 1, head_dim]``; returns all there is room for."""
        self._keys.index_copy_(2, self._place, keys)
        self._values.index_copy_(2, self._place, values)
        return self._keys, self._values


def record(step: Callable[[], Tensor]) -> Callable[[Callable[[], None]], Tensor]:
    """A function that replays ``step`` on what its argument has filled in, and returns a copy.

    Whatever tensors ``step`` reads have to live as long as the function is called.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step()  # kernels are compiled and chosen
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = step()
    free = torch.cuda.Event()

    def replay(fill: Callable[[], None]) -> Tensor:
        stream = torch.cuda.current_stream()
        stream.wait_event(free)  # the last replay may be another stream's
        fill()
        graph.replay()
        copy = result.clone()
        free.record(stream)
        return copy

    return replay
