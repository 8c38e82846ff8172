"""Cloze accuracy: the last word of a paragraph among four candidates.

A downstream measure that needs nothing but held-out documents. An item is a paragraph without its
last word; the candidates are that word and three others of the same document. The model chooses the
candidate whose tokens have the largest summed log-probability after the paragraph's beginning.
Guessing gives 25 %.

The other words are drawn from the document's running text, so a word is drawn as often as it is
used: candidates are about equally frequent, and frequency alone helps little. They match the answer
in being capitalized or not. Words are of four letters or more, which leaves out most words that
only grammar decides.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparse_bitnet.console import progress
from sparse_bitnet.core import ConfigError, DataError
from sparse_bitnet.evaluate.scoring import (
    check_window,
    choose_batch,
    evaluating,
    in_batches,
    token_log_probabilities,
    vocabulary,
)
from sparse_bitnet.nn.head import has_plain_head

CHOICES = 4
PARAGRAPH_BREAK = re.compile(r"\n\s*\n")
WORD = re.compile(r"(?<!\S)[^\W\d_]{4,}(?=[\s.,;:!?]|$)")
LAST_WORD = re.compile(r"(\s+)([^\W\d_]{4,})[.!?…\"'”’)]*$")
DRAWS = 50  # attempts to find three other words before a paragraph is left out


@dataclass(frozen=True)
class ClozeItem:
    """One question."""

    context: str  # the paragraph up to its last word, without the white space before that
    candidates: tuple[str, ...]  # four continuations, each with the white space that leads to it
    answer: int  # index of the paragraph's own


@dataclass(frozen=True)
class ClozeAccuracy:
    """Share of items answered correctly."""

    accuracy: float  # 0 to 1; 0.25 is chance
    items: int
    standard_error: float  # of the accuracy as a binomial share, √(p(1 − p)/items)

    def __str__(self) -> str:
        return (
            f"cloze accuracy {self.accuracy:.1%} ± {self.standard_error:.1%} "
            f"over {self.items:,} items (chance {1 / CHOICES:.0%})"
        )


def cloze_items(
    documents: Iterable[str],
    *,
    limit: int | None = None,
    seed: int = 0,
    context_words: int = 20,
) -> list[ClozeItem]:
    """Make items, at most one a paragraph, the same ones for the same documents and seed.

    A document's items depend on its text and the seed alone, not on its neighbours.

    Args:
        documents: texts whose paragraphs are separated by blank lines, for example
            :func:`sparse_bitnet.data.open_source`.
        limit: at most this many items, drawn from all documents; all by default.
        context_words: leave out paragraphs with fewer words before the last one.

    Raises:
        DataError: if no paragraph of any document makes an item.
        ConfigError: if ``limit`` is below 1.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"--items {limit} is out of range: make at least 1 item")
    items = [item for text in documents for item in _items_of(text, seed, context_words)]
    if not items:
        raise DataError(
            f"the documents give no cloze item: none has a paragraph of more than {context_words} "
            "words that ends in a word of four letters or more; paragraphs end at blank lines"
        )
    if limit is None or limit >= len(items):
        return items
    kept = random.Random(seed).sample(range(len(items)), limit)
    return [items[index] for index in sorted(kept)]


def _items_of(document: str, seed: int, context_words: int) -> list[ClozeItem]:
    words: list[str] = WORD.findall(document)
    draw = random.Random(f"{seed} {document}")
    items = []
    for paragraph in PARAGRAPH_BREAK.split(document):
        end = LAST_WORD.search(paragraph)
        if end is None or len(paragraph[: end.start()].split()) < context_words:
            continue
        answer = end[2]
        chosen = {answer.casefold(): answer}
        for _ in range(DRAWS):
            word = draw.choice(words) if words else answer
            if word[0].isupper() == answer[0].isupper():
                chosen.setdefault(word.casefold(), word)
            if len(chosen) == CHOICES:
                break
        else:
            continue
        candidates = list(chosen.values())
        draw.shuffle(candidates)
        items.append(
            ClozeItem(
                context=paragraph[: end.start()].lstrip(),
                candidates=tuple(end[1] + word for word in candidates),
                answer=candidates.index(answer),
            )
        )
    return items


def cloze_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[ClozeItem],
    *,
    window: int | None = None,
    batch_size: int | None = None,
) -> ClozeAccuracy:
    """Ask the model all items. Of candidates of equal score the first is taken.

    Args:
        window: as :func:`check_window` has it; a longer context loses its beginning.
        batch_size: candidates at once; by default chosen, and halved whenever memory runs out.

    Raises:
        DataError: without items, or for a tokenizer of another vocabulary than the model's, or one
            that merges words.
        ConfigError: for a window or batch size out of range, or one shorter than a candidate.
        WeightError: if the model returns NaN or infinity.
    """
    if not items:
        raise DataError("no cloze items were given")
    scores = candidate_scores(model, tokenizer, items, window, batch_size)
    answers = torch.tensor([item.answer for item in items])
    accuracy = (scores.argmax(-1) == answers).double().mean().item()
    error = math.sqrt(accuracy * (1 - accuracy) / len(items))
    return ClozeAccuracy(accuracy, len(items), error)


def candidate_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[ClozeItem],
    window: int | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """Summed log-probability of every candidate, float64 ``[items, 4]``, in nats."""
    window = check_window(model, window)
    questions = _encode(tokenizer, items)
    longest = max(len(candidate) for _, candidate in questions)
    if longest > window:
        raise ConfigError(f"--window {window} is shorter than a candidate of {longest} tokens")
    largest = max(max(*context, *candidate) for context, candidate in questions)
    if largest >= vocabulary(model):
        raise DataError(
            f"the tokenizer gives token id {largest}, outside the model's vocabulary of "
            f"{vocabulary(model)} ids; use the model's own tokenizer"
        )
    # Longest first: memory runs out at once or never, and rows of a batch are about equally long.
    order = sorted(range(len(questions)), key=lambda index: -sum(map(len, questions[index])))
    scores = torch.zeros(len(questions), dtype=torch.float64)
    with evaluating(model), progress("cloze", len(questions)) as task:
        plain_head = has_plain_head(model)

        def work(start: int, end: int) -> None:
            rows = order[start:end]
            inputs, targets, wanted = _pad([questions[row] for row in rows], window)
            log_p = token_log_probabilities(model, inputs, targets, wanted, plain_head)
            scores.index_add_(0, torch.tensor(rows)[wanted.nonzero()[:, 0]], log_p)
            task.advance(len(rows))

        in_batches(len(order), choose_batch(model, window, plain_head, batch_size), work)
    return scores.unflatten(0, (-1, CHOICES))


def _encode(
    tokenizer: PreTrainedTokenizerBase, items: Sequence[ClozeItem]
) -> list[tuple[list[int], list[int]]]:
    """Tokens of (context, candidate), four an item.

    A candidate's tokens are what the text with it has more than the text without. To encode long
    contexts once and not five times, that is done with the context's last word alone.
    """

    def encode(texts: list[str]) -> list[list[int]]:
        return list(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])

    anchors = [item.context.split()[-1] for item in items]
    contexts = encode([item.context for item in items])
    before = encode(anchors)
    after = encode(
        [anchor + c for anchor, item in zip(anchors, items, strict=True) for c in item.candidates]
    )
    questions = [
        (contexts[index // CHOICES], with_candidate[len(before[index // CHOICES]) :])
        for index, with_candidate in enumerate(after)
    ]
    if not all(candidate for _, candidate in questions):
        raise DataError(
            "the tokenizer merges tokens across white space, so that a word has none of its own: "
            "cloze accuracy is not defined for it"
        )
    return questions


def _pad(
    questions: list[tuple[list[int], list[int]]], window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and which targets are a candidate's: ``[rows, longest]`` each."""
    texts = [(context + candidate)[-window - 1 :] for context, candidate in questions]
    shape = len(texts), max(map(len, texts)) - 1
    inputs = torch.zeros(shape, dtype=torch.int64)
    targets = torch.zeros(shape, dtype=torch.int64)
    wanted = torch.zeros(shape, dtype=torch.bool)
    for row, (text, (_, candidate)) in enumerate(zip(texts, questions, strict=True)):
        tokens = torch.tensor(text)
        inputs[row, : len(text) - 1] = tokens[:-1]
        targets[row, : len(text) - 1] = tokens[1:]
        wanted[row, len(text) - 1 - len(candidate) : len(text) - 1] = True
    return inputs, targets, wanted
