"""Perplexity of a causal language model over token shards, token arrays or text files.

A model that reads at most ``window`` tokens scores a longer text in windows, each ``stride`` tokens
after the one before. A window's input is ``window`` tokens; it predicts the token after each of
them and is charged for those that no earlier window has scored. Window 6, stride 2, 13 tokens::

    token          0   1   2   3   4   5   6   7   8   9  10  11  12
    window 0     [ .   #   #   #   #   #]  #
    window 1             [ .   .   .   .   .   #]  #
    window 2                     [ .   .   .   .   .   #]  #
    window 3                             [ .   .   .   .   .   #]  #

    [ ] input    # predicted and scored    . context only

Every token but the first is scored exactly once, and after the first window each has at least
window − stride + 1 tokens of context. Stride = window is fastest; it is what training's validation
loss computes. A small stride gives every token nearly a full window of context, at window / stride
times the cost. The last window starts early enough to be a full one.

Shards of conversations are scored one conversation at a time, and their answers alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparse_bitnet.console import progress
from sparse_bitnet.core import ConfigError, DataError
from sparse_bitnet.data import Source, TokenShards, tokenizer_hash
from sparse_bitnet.data.tokenizer import Encoder
from sparse_bitnet.evaluate.scoring import (
    check_window,
    choose_batch,
    evaluating,
    in_batches,
    token_log_probabilities,
    vocabulary,
)
from sparse_bitnet.nn.head import has_plain_head


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text."""

    loss: float  # mean over the scored tokens, nats a token
    perplexity: float  # e^loss; comparable between models of one tokenizer only
    # Total loss over the text's UTF-8 bytes, in bits; None if their number is not known. Comparable
    # between tokenizers.
    bits_per_byte: float | None
    tokens: int  # that were scored
    bytes: int | None  # UTF-8, of the scored text
    answers_only: bool = False  # the tokens are those of answers in conversations

    @classmethod
    def of(
        cls, nats: float, tokens: int, text_bytes: int | None = None, answers_only: bool = False
    ) -> Perplexity:
        """From the summed loss of ``tokens`` tokens, which spell ``text_bytes`` bytes."""
        loss = nats / tokens
        bits = nats / math.log(2) / text_bytes if text_bytes else None
        return cls(loss, _exp(loss), bits, tokens, text_bytes, answers_only)

    def __str__(self) -> str:
        line = f"perplexity {self.perplexity:.2f} (loss {self.loss:.4f} nats/token"
        if self.bits_per_byte is not None:
            line += f", {self.bits_per_byte:.4f} bits/byte"
        return f"{line}) over {self.tokens:,} tokens{' of answers' if self.answers_only else ''}"


def perplexity(
    model: PreTrainedModel,
    source: TokenShards | Source | NDArray[np.integer] | Tensor,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
    title: str = "perplexity",
) -> Perplexity:
    """Score a text with strided windows, as drawn at the top of this file.

    Runs where the model is, in the model's dtypes; wrap the call in ``torch.autocast`` for another.
    The result does not depend on the batch size (beyond rounding).

    Args:
        source: token shards, of which answers alone are scored where they hold conversations; a
            one-dimensional integer array or tensor of token ids; or text. Its documents are joined
            as in shards, with the end-of-sequence token, and one more stands before the first, so
            that its first word is scored as well.
        tokenizer: required for text; with shards, checked to be the one that made them.
        window: as :func:`check_window` has it; give the length that the model was trained with.
        stride: tokens from one window to the next, 1 to ``window``; by default half a window.
        batch_size: windows at once; by default chosen, and halved whenever memory runs out.
        limit: score at most this many tokens, the first ones; how many bytes they spell is then
            not known.
        title: of the progress bar.

    Raises:
        DataError: if the text is empty or shorter than two tokens or cannot be read, a token id
            lies outside the model's vocabulary, or shards and tokenizer differ.
        ConfigError: for a window, stride, batch size or limit out of range, or a missing tokenizer.
        WeightError: if the model returns NaN or infinity.
    """
    window = check_window(model, window)
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride <= window:
        raise ConfigError(f"--stride {stride} is out of range: 1 to the window, {window}")
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit {limit} is out of range: score at least 1 token")
    vocab = vocabulary(model)
    text = _open(source, tokenizer, vocab)
    total = text.total if limit is None else text.cut(limit)
    if total < 2:
        raise DataError(f"{text.name}: too short, {total} token(s); perplexity needs at least 2")
    plans = [
        _windows(begin, min(end, total), window, stride) for begin, end in text.documents(total)
    ]
    firsts, ends, scored_to = (np.concatenate(column) for column in zip(*plans, strict=True))

    def read(start: int, end: int) -> tuple[Tensor, Tensor]:
        """Tokens ``[rows, longest]`` of some windows, padded on the right, and which of them they
        are charged for."""
        rows = slice(start, end)
        starts, lengths = firsts[rows], ends[rows] - firsts[rows]
        tokens = np.zeros((len(starts), lengths.max()), dtype=np.int64)
        wanted = np.zeros(tokens.shape, dtype=bool)
        for row, (first, length, scored) in enumerate(
            zip(starts, lengths, scored_to[rows], strict=True)
        ):
            tokens[row, :length] = text.read(first, length)
            wanted[row, :length] = text.learned(first, length)
            wanted[row, : scored - first + 1] = False
        foreign = np.argwhere((tokens < 0) | (tokens >= vocab))
        if len(foreign):
            row, column = foreign[0]
            raise DataError(
                f"{text.name}: token id {tokens[row, column]} at position {starts[row] + column} "
                f"is outside the model's vocabulary of {vocab} ids; the tokens were made with "
                "another tokenizer, prepare them with the model's own"
            )
        return torch.from_numpy(tokens), torch.from_numpy(wanted)

    nats = 0.0
    scored = 0
    with evaluating(model), progress(title, total - 1) as task:
        plain_head = has_plain_head(model)

        def work(start: int, end: int) -> None:
            nonlocal nats, scored
            tokens, wanted = read(start, end)
            log_p = token_log_probabilities(
                model, tokens[:, :-1], tokens[:, 1:], wanted[:, 1:], plain_head
            )
            nats -= log_p.sum().item()
            scored += len(log_p)
            task.advance(len(log_p), f"ppl {_exp(nats / max(1, scored)):.2f}")

        in_batches(len(firsts), choose_batch(model, window, plain_head, batch_size), work)
    known = text.bytes if total == text.total else None
    return Perplexity.of(nats, scored, known, text.shards is not None)


def _windows(begin: int, end: int, window: int, stride: int) -> tuple[NDArray[np.int64], ...]:
    """Of the tokens ``[begin, end)``: where each window begins and ends, its last target included,
    and up to which token others have scored."""
    window = min(window, end - begin - 1)
    last = end - 1 - window
    firsts = np.minimum(begin + stride * np.arange(1 + math.ceil((last - begin) / stride)), last)
    return firsts, firsts + window + 1, np.concatenate([[begin], firsts[:-1] + window])


@dataclass(frozen=True)
class _Text:
    """A run of token ids, read by ``read(start, count)``: in one piece, or conversations where
    ``shards`` are given."""

    name: str
    total: int
    bytes: int | None
    read: Callable[[int, int], NDArray[np.integer]]
    shards: TokenShards | None = None

    def learned(self, start: int, count: int) -> NDArray[np.bool_] | bool:
        """Which of some tokens are scored."""
        return True if self.shards is None else self.shards.marks([start], count)[0][0]

    def documents(self, total: int) -> list[tuple[int, int]]:
        """Where each begins and ends, of the first ``total`` tokens; of two tokens at least."""
        if self.shards is None:
            return [(0, total)]
        begins = self.shards.document_starts()
        ends = np.minimum([*begins[1:], self.total], total)
        return [(b, e) for b, e in zip(begins.tolist(), ends.tolist(), strict=True) if e - b > 1]

    def cut(self, limit: int) -> int:
        """How many tokens hold the first ``limit`` scored ones."""
        if self.shards is None:
            return min(self.total, limit + 1)
        places = np.flatnonzero(self.learned(0, self.total))
        return self.total if len(places) <= limit else int(places[limit - 1]) + 1


def _open(
    source: TokenShards | Source | NDArray[np.integer] | Tensor,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab: int,
) -> _Text:
    if isinstance(source, TokenShards):
        source.require_vocabulary(vocab)
        if tokenizer is not None:
            source.require_tokenizer(tokenizer_hash(tokenizer))
        name, chats = f"token shards {source.path}", source if source.has_answers else None
        known = None if chats else source.total_bytes
        return _Text(name, source.total_tokens, known, source.tokens, chats)
    if isinstance(source, Source):
        return _encoded(source, tokenizer)
    array = source.numpy(force=True) if isinstance(source, Tensor) else source
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise DataError(
            f"token array: shape {tuple(array.shape)} of {array.dtype}; token ids are a "
            "one-dimensional array of integers"
        )
    return _Text("token array", len(array), None, lambda start, n: array[start : start + n])


def _encoded(source: Source, tokenizer: PreTrainedTokenizerBase | None) -> _Text:
    """Documents with the end-of-sequence token before, between and after them; no empty ones."""
    if tokenizer is None:
        raise ConfigError("text needs a tokenizer: pass the model's own as `tokenizer`")
    documents = [document for document in source if document]
    if not documents:
        raise DataError(f"there is no text to score: {source.spec}")
    encoder = Encoder(tokenizer)
    ids = np.concatenate([[encoder.eos_id], encoder.encode(documents).astype(np.int64)])
    known = sum(len(document.encode()) for document in documents)
    return _Text("text", len(ids), known, lambda start, count: ids[start : start + count])


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
