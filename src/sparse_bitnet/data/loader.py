"""Batches of token windows whose order is a pure function of (seed, step, rank, world size).

No state is kept: resuming needs the step number alone, on any number of ranks. Every sample of the
run has a global number g = step · batch_size + row. Three pure functions place it:

1. g → (source, k): a mixture hands its samples to its sources like Bresenham's line: source A with
   share p takes sample g when ⌊(g+1)p⌋ > ⌊gp⌋, and ⌊gp⌋ is how many it had before. The rest goes to
   the next source the same way. So after any number of samples a source is within one sample per
   source before it of its exact share, with no table and no random draw.
2. k → (epoch, position): an epoch reads every window of a source once. Windows of text follow each
   other; of conversations each begins with one and holds as many whole ones as fit (next fit).
3. (epoch, position) → window: a keyed Feistel permutation of the windows, another each epoch. It
   needs no memory; a stored permutation for 50 billion tokens would take 800 MB on every rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from fractions import Fraction
from math import isqrt
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparse_bitnet.console import say
from sparse_bitnet.core.errors import ConfigError, DataError
from sparse_bitnet.data.shards import TokenShards

FEISTEL_ROUNDS = 8
IGNORED = -100  # as everywhere in PyTorch and transformers


class Batch(NamedTuple):
    """Sequences of one length: int64 ``[sequences, length]``."""

    inputs: Tensor
    labels: Tensor  # the token after each input; −100 is not learned
    # Of each input in its document. Where they begin anew, so does attention. None: a sequence is
    # one document, and all of it is learned.
    positions: Tensor | None = None
    divisor: Tensor | None = None  # of the sum of losses, a scalar; None: the number of labels

    @classmethod
    def of(cls, tokens: Tensor) -> Batch:
        """Sequences of which all is learned, from ``[sequences, length + 1]`` token ids."""
        return cls(tokens[:, :-1], tokens[:, 1:])

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same with each tensor changed."""
        return Batch(*(None if one is None else change(one) for one in self))  # type: ignore[arg-type]

    def split(self, sequences: int) -> list[Batch]:
        """Consecutive parts of so many sequences."""
        starts = range(0, len(self.inputs), sequences)
        return [self.map(lambda one, at=start: one[at : at + sequences]) for start in starts]  # type: ignore[misc]


class Loader:
    """Windows of ``sequence_length + 1`` tokens; inputs are all but the last, labels all but the
    first. Neighbouring windows of text share one token, so that every token but the first is once a
    label. Conversations do not attend to each other; what is left of a window behind the last whole
    one is not learned.

    Args:
        sources: shards, or a mixture ``[(shards, weight), …]``; weights are relative and count
            samples, which are all of one length, so they count tokens too.
        sequence_length: tokens a window predicts.
        batch_size: global sequences a step, over all ranks.
        seed: of the order.
        rank, world_size: which of how many equal parts of each batch is this process's.
        separate_documents: documents of text do not attend to each other either.

    Raises:
        ConfigError: if the ranks do not divide the batch.
        DataError: if shards hold fewer tokens than one window, or come from different tokenizers;
            if no answer of conversations lies within a window's length.
    """

    def __init__(
        self,
        sources: TokenShards | Sequence[tuple[TokenShards, float]],
        sequence_length: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        separate_documents: bool = False,
    ) -> None:
        mixture = [(sources, 1.0)] if isinstance(sources, TokenShards) else list(sources)
        if batch_size % world_size:
            raise ConfigError(
                f"batch_size is {batch_size}: it must be a multiple of the {world_size} ranks"
            )
        first = mixture[0][0]
        for shards, _ in mixture:
            shards.require_tokenizer(first.tokenizer_hash, f"that of {first.path}")
            if shards.total_tokens <= sequence_length and not shards.has_answers:
                raise DataError(
                    f"{shards.path}: {shards.total_tokens} tokens, fewer than one window of "
                    f"{sequence_length + 1}; use a shorter data.sequence_length or more text"
                )
        self.sequence_length, self.batch_size, self.seed = sequence_length, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.sources = [shards for shards, _ in mixture]
        # Whether batches have positions.
        self.has_documents = separate_documents or any(s.has_answers for s in self.sources)
        self._separate_text = separate_documents
        # Of conversations: where each window begins and ends.
        self._packed = [self._pack(s) if s.has_answers else None for s in self.sources]
        self.windows = [  # of each source
            (s.total_tokens - 1) // sequence_length if packed is None else len(packed)
            for s, packed in zip(self.sources, self._packed, strict=True)
        ]
        weights = [Fraction(weight) for _, weight in mixture]
        shares = [weight / sum(weights[i:]) for i, weight in enumerate(weights)]
        self._shares = [(share.numerator, share.denominator) for share in shares]
        self._keys = [_key(seed, number) for number in range(len(mixture))]

    def batch(self, step: int) -> Batch:
        """This rank's part of a step's batch, ``batch_size / world_size`` sequences; the parts in
        rank order are the global batch."""
        rows = self.batch_size // self.world_size
        first = int(step) * self.batch_size + self.rank * rows
        places = [self._place(sample) for sample in range(first, first + rows)]
        owners = np.array([source for source, _ in places])
        numbers = np.array([k for _, k in places], dtype=np.uint64)
        shape = (rows, self.sequence_length + 1)
        tokens = np.empty(shape, dtype=np.int64)
        learned, begins = np.ones(shape, dtype=bool), np.zeros(shape, dtype=bool)
        for source in np.unique(owners):
            mine = owners == source
            windows = self._window(int(source), numbers[mine])
            tokens[mine], learned[mine], begins[mine] = self._read(int(source), windows)
        whole = Batch.of(torch.from_numpy(tokens))
        if not self.has_documents:
            return whole
        labels = whole.labels.masked_fill(torch.from_numpy(~learned[:, 1:]), IGNORED)
        places_in_row = np.arange(shape[1])
        last_begin = np.maximum.accumulate(np.where(begins, places_in_row, 0), axis=1)
        positions = torch.from_numpy((places_in_row - last_begin)[:, :-1])
        return Batch(whole.inputs, labels, positions)

    def _read(
        self, source: int, windows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | bool, np.ndarray | bool]:
        """Tokens of some windows, which of them are learned, and which begin a document."""
        shards, packed = self.sources[source], self._packed[source]
        length = self.sequence_length + 1
        if packed is None:
            starts = windows * self.sequence_length
            tokens = shards.windows(starts, length)
            learned, begins = shards.marks(starts, length) if self._separate_text else (True, False)
            return tokens, learned, begins
        shape = (len(windows), length)
        tokens = np.full(shape, shards.eos_id)  # padding: documents of one token, not learned
        learned, begins = np.zeros(shape, dtype=bool), np.ones(shape, dtype=bool)
        for row, (start, end) in enumerate(packed[windows]):
            here = slice(0, end - start)
            tokens[row, here] = shards.tokens(start, end - start)
            learned[row, here], begins[row, here] = shards.marks([start], end - start)
        return tokens, learned, begins

    def _pack(self, shards: TokenShards) -> np.ndarray:
        """Where windows over conversations begin and end: int64 ``[windows, 2]``.

        One longer than a window is cut; if no answer stands before the cut it is left out.
        """
        most = self.sequence_length + 1
        begins = shards.document_starts().tolist()
        windows: list[list[int]] = []
        cut = lost = 0
        for begin, end in zip(begins, [*begins[1:], shards.total_tokens], strict=True):
            if end - begin > most:
                cut += 1
                if not shards.marks([begin], most)[0].any():
                    lost += 1
                    continue
            if windows and end - windows[-1][0] <= most:
                windows[-1][1] = end
            else:
                windows.append([begin, min(end, begin + most)])
        if cut and self.rank == 0:
            say(
                f"warning: {shards.path}: {cut:,} of {len(begins):,} conversations are longer than "
                f"{most:,} tokens and are cut; {lost:,} of them have no answer before the cut and "
                "are left out"
            )
        if not windows:
            raise DataError(
                f"{shards.path}: no answer begins within {most} tokens of its conversation's "
                "beginning; use a longer data.sequence_length"
            )
        return np.array(windows)

    def _place(self, sample: int) -> tuple[int, int]:
        """Global sample → (source, how many samples that source gave before); exact integers."""
        for source, (share, whole) in enumerate(self._shares):
            before = sample * share // whole
            if (sample + 1) * share // whole > before:
                return source, before
            sample -= before
        raise AssertionError("the last source takes all that is left: its share is 1")

    def _window(self, source: int, numbers: np.ndarray) -> np.ndarray:
        """A source's sample numbers → its windows, each once an epoch, in a new order each time."""
        count = np.uint64(self.windows[source])
        epochs, positions = np.divmod(numbers, count)
        return _permute(positions, self.windows[source], _mix(epochs + self._keys[source]))


def _key(seed: int, source: int) -> np.uint64:
    digest = hashlib.blake2b(f"{seed} {source}".encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014): a bijection of 64-bit integers."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _permute(positions: np.ndarray, count: int, keys: np.ndarray) -> np.ndarray:
    """A keyed permutation of 0 … count − 1, applied to ``positions`` (uint64, key of each alike).

    A Feistel network on a grid of rows × columns that just covers ``count``: each round adds a hash
    of one coordinate to the other, modulo its size, which can be undone, so it is a bijection of
    the grid. What lands outside ``count`` is permuted again until it is inside (cycle walking,
    Black and Rogaway 2002); fewer than √count + 1 cells are to spare, so that is rare.
    """
    columns = isqrt(count - 1) + 1
    rows = -(-count // columns)
    size = np.array([rows, columns], dtype=np.uint64)
    out = positions.copy()
    pending = np.arange(len(out))
    while len(pending):
        cell = list(np.divmod(out[pending], size[1]))
        for number in range(FEISTEL_ROUNDS):
            side = number % 2
            noise = _mix(cell[1 - side] ^ _mix(keys[pending] + np.uint64(number)))
            cell[side] = (cell[side] + noise % size[side]) % size[side]
        out[pending] = cell[0] * size[1] + cell[1]
        pending = pending[out[pending] >= np.uint64(count)]
    return out
