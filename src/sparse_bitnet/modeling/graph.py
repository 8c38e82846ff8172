"""One token of each sequence from embedding to logits as one CUDA graph, on a GPU.

Module by module, a token of a 7B model launches some seven hundred kernels of a few microseconds
from Python, which takes 30 to 50 ms; as one graph it takes 3. What a graph replays is fixed, so
what changes from token to token lies in tensors of its own that are written before:

    ids, positions ──────────────┐
    places of keys and values ───┼──▶ embedding ─ layers ─ norm ─ head ──▶ logits
    which keys count ────────────┘           │
                                  keys and values: the cache's own memory

The cache is a :class:`KeyValueCache`, or transformers' paged one of continuous batching, whose
keys and values are gathered from their pages in every layer.

A graph is recorded for the addresses of a cache (and of the weights), a number of sequences and of
keys. Recording takes as long as a few tokens, so it waits until these are met for the third time in
a row: some answers are short, and some caches move with every token (beam search). Results are
those of the modules up to the order of float sums.

While one thread records, another one must not draw from the GPU's default generator: CUDA's
recording owns it for that tenth of a second, and PyTorch raises in the other thread.
"""

from __future__ import annotations

import math
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparse_bitnet.modeling.cache import FixedLayer
from sparse_bitnet.modeling.layers import FULL
from sparse_bitnet.modeling.reads import (
    Given,
    Reads,
    Step,
    batch_layers,
    page_allocator,
    rotates_alone,
)

DEVICE = "cuda"
MOST_GRAPHS = 8
"""Those that were not used for longest are dropped; each holds the activations of a pass."""
MEETINGS = 3
FEWEST_KEYS = 256
"""Of a pass over pages: it has room for so many of a sequence, or a power of two more."""
MOST_GATHERED = 2**25
"""Numbers that a layer gathers from pages for keys, and for values: 134 MB in bfloat16 together.
Steps that need more, of a long text beside short ones, go module by module."""
_ONE_RECORDS = threading.Lock()  # in a process: recording synchronizes the device


class GraphStep(Step):
    """The recorded passes of a decoder. Calls of several threads take turns."""

    def _forget(self) -> None:
        self._reads = Reads(self._decoder)
        self._graphs: dict[tuple[int, ...], _Recorded] = {}
        self._met: tuple[tuple[int, ...], int] = ((), 0)
        self._has_failed = False
        self._turn = threading.Lock()

    def drop(self) -> None:
        """Forget all graphs and the memory that they hold."""
        with self._turn:
            self._forget()

    def __call__(self, given: Given) -> Tensor | None:
        """See :class:`Step`. Left to the modules: other devices and caches, embeddings, several
        tokens of a sequence, sliding windows, hooks on modules, autocast, gradients, compilation;
        and what has not been met often enough to be recorded."""
        head, input_ids, inputs_embeds, mask, position_ids, cache, options = given
        own: Any = self._decoder.layers
        if (
            self._has_failed
            or torch.compiler.is_compiling()
            or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
            or input_ids is None
            or inputs_embeds is not None
            or input_ids.device.type != DEVICE
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled(DEVICE)
            or self._decoder.config._attn_implementation != "sdpa"
            or not rotates_alone(self._decoder)
            or not all(one.is_packed and one.self_attn.sliding_window is None for one in own)
        ):
            return None
        if options.get("cache") is not None:
            tokens: _Tokens | None = _in_pages(input_ids, position_ids, options, len(own))
        else:
            layers = batch_layers(cache, mask, input_ids, len(own))
            if layers is None:
                return None
            tokens = _Batch(input_ids, position_ids, mask, layers)
        if tokens is None:
            return None
        with self._turn:
            recorded = self._recorded(head, tokens)
            return None if recorded is None else tokens.done(recorded(tokens))

    def _recorded(self, head: nn.Module, tokens: _Tokens) -> _Recorded | None:
        """The graph for tokens like these; None if they have not been met often enough."""
        decoder: Any = self._decoder
        modules = decoder.embed_tokens, decoder.rotary_emb, head
        others = [one for module in modules for one in (*module.parameters(), *module.buffers())]
        key = *tokens.shape, id(head), *self._reads.now([*others, *tokens.memory()])
        if self._reads.are_hooked(head):
            return None
        recorded = self._graphs.pop(key, None)
        if recorded is None:
            self._met = (key, self._met[1] + 1 if self._met[0] == key else 1)
            if self._met[1] < MEETINGS:
                return None
            try:
                with _ONE_RECORDS:
                    recorded = _Recorded(decoder, head, tokens, self._reads.weights)
            except RuntimeError as error:  # CUDA's, such as no memory left
                self._has_failed = True
                self._graphs.clear()
                warnings.warn(
                    "tokens are computed module by module from now on, which is slower: a CUDA "
                    f"graph of them could not be recorded ({str(error)[:300]})",
                    stacklevel=2,
                )
                return None
        self._graphs[key] = recorded  # the latest is the last
        while len(self._graphs) > MOST_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        return recorded


class _Recorded:
    """A recorded pass. It owns its inputs and keeps the weights.

    Keys and values belong to the cache, which is all that keeps them: a graph of a cache that is
    gone is not asked for again, unless another cache has been given the same memory.
    """

    def __init__(self, decoder: Any, head: nn.Module, tokens: _Tokens, weights: list[Any]) -> None:
        self._kept = weights, head  # so that no id of the key is used again
        with torch.inference_mode(False), torch.device(tokens.ids.device):  # written in any mode
            self.inputs = inputs = tokens.inputs()
        inputs.fill(tokens)
        layers = inputs.layers(tokens)

        def step() -> Tensor:
            hidden = decoder(
                input_ids=inputs.ids,
                attention_mask={FULL: inputs.counts()[:, None, None]},
                position_ids=inputs.positions,
                past_key_values=_Cache(layers),
            ).last_hidden_state
            logits: Tensor = head(hidden)
            return logits

        self._replay = record(step, tokens.ids.device)

    def __call__(self, tokens: _Tokens) -> Tensor:
        """Logits ``[sequences, 1, vocabulary]``."""
        return self._replay(lambda: self.inputs.fill(tokens))


class _Cache:
    """What the decoder takes for a cache."""

    offloading = False

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers


class _Tokens(ABC):
    """One token of each sequence, as a call gives them.

    Attributes:
        ids: of the tokens.
        shape: sequences, and keys of each that there is room for, of a pass over them.
    """

    ids: Tensor
    shape: tuple[int, int]

    @abstractmethod
    def memory(self) -> list[Tensor]:
        """Keys and values of the cache."""

    @abstractmethod
    def inputs(self) -> Any:
        """New inputs of a pass over tokens like these."""

    @abstractmethod
    def done(self, logits: Tensor) -> Tensor:
        """Count the tokens, and give the logits the shape that was asked for."""


class _Batch(_Tokens):
    """The next token of each sequence of a :class:`KeyValueCache`."""

    def __init__(self, ids: Tensor, positions: Any, mask: Any, layers: list[Any]) -> None:
        self.ids, self.positions, self.mask, self._layers = ids, positions, mask, layers
        self.seen = layers[0].get_seq_length()
        self.buffers: list[tuple[Tensor, Tensor]] = [one.reserve(1) for one in layers]
        self.shape = ids.shape[0], self.buffers[0][0].shape[2]

    def memory(self) -> list[Tensor]:
        return [one for both in self.buffers for one in both]

    def inputs(self) -> _BatchInputs:
        return _BatchInputs(*self.shape)

    def done(self, logits: Tensor) -> Tensor:
        for one in self._layers:
            one.extend(1)
        return logits


class _BatchInputs:
    def __init__(self, batch: int, length: int) -> None:
        self.ids, self.positions = torch.zeros(2, batch, 1, dtype=torch.int64).unbind()
        self.place = torch.zeros(1, dtype=torch.int64)
        self.kept = torch.ones(batch, length, dtype=torch.bool)
        self.numbers = torch.arange(length)

    def fill(self, tokens: _Batch) -> None:
        self.ids.copy_(tokens.ids)
        self.place.fill_(tokens.seen)
        if tokens.positions is None:
            self.positions.fill_(tokens.seen)
        else:
            self.positions.copy_(tokens.positions)
        if tokens.mask is None:
            self.kept.fill_(True)
        else:
            self.kept[:, : tokens.seen + 1].copy_(tokens.mask)

    def counts(self) -> Tensor:
        """Which keys count: ``[batch, length]``."""
        return (self.numbers <= self.place) & self.kept

    def layers(self, tokens: _Batch) -> list[Any]:
        return [FixedLayer(*both, self.place) for both in tokens.buffers]


class _Pages(_Tokens):
    """One token of each sequence of transformers' paged cache, ``[1, sequences]``.

    A pass over them has a power of two of sequences, the last of which stands for the others that
    are not there, and of keys.
    """

    def __init__(
        self, ids: Tensor, positions: Tensor, options: dict[str, Any], allocator: Any, count: int
    ) -> None:
        self.ids, self.positions, self.allocator, self.count = ids, positions, allocator, count
        self.ends = options["cu_seq_lens_k"][FULL]
        self.reads = options["read_index"][allocator.index]
        self.writes = options["write_index"][allocator.index]
        keys = max(FEWEST_KEYS, options["max_length_k"][FULL])
        self.shape = _power_of_two(ids.shape[1]), _power_of_two(keys)

    def memory(self) -> list[Tensor]:
        pages = (self.allocator.get_cache_for_block_table(index) for index in range(self.count))
        return [one for both in pages for one in both]

    def inputs(self) -> _PagesInputs:
        return _PagesInputs(*self.shape)

    def done(self, logits: Tensor) -> Tensor:
        return logits[: self.ids.shape[1]].transpose(0, 1)


class _PagesInputs:
    def __init__(self, sequences: int, length: int) -> None:
        self.ids, self.positions = torch.zeros(2, sequences, 1, dtype=torch.int64).unbind()
        self.writes, self.lengths, self.rows = torch.zeros(3, sequences, dtype=torch.int64).unbind()
        self.rows.copy_(torch.arange(sequences))
        self.reads = torch.zeros(sequences, length, dtype=torch.int64)
        self.numbers = torch.arange(length)

    def fill(self, tokens: _Pages) -> None:
        rows = self.rows.clamp(max=tokens.ids.shape[1] - 1)
        self.ids.copy_(tokens.ids[0, rows, None])
        self.positions.copy_(tokens.positions[0, rows, None])
        self.writes.copy_(tokens.writes[rows])
        starts = tokens.ends[rows]
        self.lengths.copy_(tokens.ends[rows + 1] - starts)
        places = starts[:, None] + self.numbers
        self.reads.copy_(tokens.reads[places.clamp_(max=tokens.reads.shape[0] - 1)])

    def counts(self) -> Tensor:
        """Which keys count: ``[sequences, length]``."""
        return self.numbers < self.lengths[:, None]

    def layers(self, tokens: _Pages) -> list[Any]:
        return [_FromPages(tokens.allocator, index, self) for index in range(tokens.count)]


class _FromPages:
    """A layer's cache whose sequences have their tokens in pages."""

    def __init__(self, allocator: Any, index: int, inputs: _PagesInputs) -> None:
        self._allocator, self._index, self._inputs = allocator, index, inputs

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write ``[sequences, heads, 1, head_dim]``; returns the keys and values of each."""
        reads, writes = self._inputs.reads, self._inputs.writes
        both = self._allocator.update(
            keys[:, :, 0], values[:, :, 0], self._index, reads.flatten(), writes
        )
        keys, values = (one.unflatten(0, reads.shape).transpose(1, 2) for one in both)
        return keys, values


def _in_pages(ids: Tensor, positions: Any, options: dict[str, Any], count: int) -> _Pages | None:
    """The tokens in pages, if they are one a sequence and not too many to gather."""
    allocator = page_allocator(options, ids, count)
    if allocator is None or positions is None:
        return None
    tokens = _Pages(ids, positions, options, allocator, count)
    heads, width = tokens.memory()[0].shape[-2:]
    return tokens if math.prod(tokens.shape) * heads * width <= MOST_GATHERED else None


def _power_of_two(number: int) -> int:
    """The smallest that is not below."""
    return 1 << (number - 1).bit_length()


def record(
    step: Callable[[], Tensor], device: torch.device
) -> Callable[[Callable[[], None]], Tensor]:
    """A function that replays ``step`` on what its argument has filled in, and returns a copy.

    Whatever tensors ``step`` reads have to live as long as the function is called.
    """
    with torch.cuda.device(device):
        aside, graph, free = torch.cuda.Stream(), torch.cuda.CUDAGraph(), torch.cuda.Event()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # left too where recording fails
            step()  # kernels are compiled and chosen
            with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
                result = step()
        torch.cuda.current_stream().wait_stream(aside)

    def replay(fill: Callable[[], None]) -> Tensor:
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream()
            stream.wait_event(free)  # the last replay may be another stream's
            fill()
            graph.replay()
            copy = result.clone()
            free.record(stream)
            return copy

    return replay
