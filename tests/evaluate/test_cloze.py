import math

import pytest
import torch

from sparse_bitnet.core import ConfigError, DataError
from sparse_bitnet.evaluate import ClozeAccuracy, ClozeItem, cloze_accuracy, cloze_items
from sparse_bitnet.evaluate.cloze import candidate_scores


@pytest.fixture(scope="module")
def items(prose):
    return cloze_items([prose])


@torch.no_grad()
def slow_score(model, tokenizer, context, candidate, window):
    """Sum of the candidate's log-probabilities, a token at a time."""
    before = tokenizer(context)["input_ids"]
    whole = tokenizer(context + candidate)["input_ids"]
    assert whole[: len(before)] == before
    kept = whole[-window - 1 :]
    total = 0.0
    for place in range(len(kept) - (len(whole) - len(before)), len(kept)):
        logits = model(input_ids=torch.tensor([kept[:place]])).logits[0, -1].double()
        total += logits.log_softmax(-1)[kept[place]].item()
    return total


@pytest.mark.parametrize("window", [64, 12])
def test_scores_equal_a_slow_loop(model, tokenizer, items, window):
    found = candidate_scores(model, tokenizer, items[:3], window=window, batch_size=5)
    assert found.shape == (3, 4)
    for item, scores in zip(items, found, strict=False):
        expected = [
            slow_score(model, tokenizer, item.context, candidate, window)
            for candidate in item.candidates
        ]
        assert scores.tolist() == pytest.approx(expected, rel=1e-5)


def test_batch_size_does_not_matter(ternary_model, tokenizer, items):
    found = [
        candidate_scores(ternary_model, tokenizer, items, window=32, batch_size=size)
        for size in (1, 7, None)
    ]
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-5, atol=1e-5)


def test_accuracy_is_the_share_of_right_answers(model, tokenizer, items):
    scores = candidate_scores(model, tokenizer, items)
    right = sum(int(row.argmax()) == item.answer for row, item in zip(scores, items, strict=True))
    found = cloze_accuracy(model, tokenizer, items)
    share = right / len(items)
    assert found.items == len(items)
    assert found.accuracy == pytest.approx(share)
    assert found.standard_error == pytest.approx(math.sqrt(share * (1 - share) / len(items)))


def test_a_model_that_knows_the_answers_has_accuracy_one(model, tokenizer, items, monkeypatch):
    def oracle(model, tokenizer, items, *options):
        return torch.nn.functional.one_hot(torch.tensor([item.answer for item in items]), 4)

    monkeypatch.setitem(cloze_accuracy.__globals__, "candidate_scores", oracle)
    found = cloze_accuracy(model, tokenizer, items)
    assert (found.accuracy, found.standard_error) == (1.0, 0.0)


def test_line():
    assert str(ClozeAccuracy(0.5, 1600, 0.0125)) == (
        "cloze accuracy 50.0% ± 1.2% over 1,600 items (chance 25%)"
    )


def test_what_an_item_is(prose, items):
    paragraphs = prose.split("\n\n")
    assert len(items) == len(paragraphs)
    for item, paragraph in zip(items, paragraphs, strict=True):
        assert item.context + item.candidates[item.answer] + "." == paragraph
        assert len({candidate.casefold() for candidate in item.candidates}) == 4
        for candidate in item.candidates:
            assert candidate.startswith(" ")
            assert len(candidate) > 4
            assert candidate[1:] in prose
    answers = {item.answer for seed in range(3) for item in cloze_items([prose], seed=seed)}
    assert answers == {0, 1, 2, 3}


FILLER = "many small words that fill the line and make this paragraph long enough for one item"


@pytest.mark.parametrize(
    "ending",
    ["ends in a hyphen-word.", "ends in 1984.", "ends on it.", "ends (strangely", "ends -- so"],
)
def test_paragraphs_without_a_last_word(ending):
    good = f"{FILLER} and ends with something."
    found = cloze_items([f"{FILLER} and {ending}\n\n{good}"], context_words=10)
    assert [item.candidates[item.answer] for item in found] == [" something"]


def test_punctuation_line_breaks_and_capitals():
    text = f'{FILLER}, Paris, Rome, London, Berlin, Madrid said "go to\nVienna."'
    (item,) = cloze_items([text], context_words=10)
    assert item.candidates[item.answer] == "\nVienna"
    assert all(candidate[1].isupper() for candidate in item.candidates)
    (item,) = cloze_items([text.replace("Vienna", "größe")], context_words=10)
    assert item.candidates[item.answer] == "\ngröße"
    assert all(candidate[1].islower() for candidate in item.candidates)


def test_short_paragraphs_and_poor_documents_give_none():
    with pytest.raises(DataError, match="no cloze item: none has a paragraph of more than 20"):
        cloze_items(["too short for that"])
    with pytest.raises(DataError, match="no cloze item"):
        cloze_items(["word " * 40])  # no other word to choose from
    with pytest.raises(DataError, match="no cloze item"):
        cloze_items([])


def test_a_documents_items_do_not_depend_on_its_neighbours(prose):
    other = prose[::-1]
    assert cloze_items([other + FILLER, prose])[-12:] == cloze_items([prose])
    assert cloze_items([prose], seed=1) != cloze_items([prose])


def test_limit_draws_from_all_documents(prose):
    documents = [f"{prose} Extra words number {number}" for number in range(5)]
    everything = cloze_items(documents)
    found = cloze_items(documents, limit=10)
    assert len(found) == 10
    assert [item for item in everything if item in found]
    assert found == cloze_items(documents, limit=10)
    assert found != everything[:10]
    assert cloze_items(documents, limit=10_000) == everything
    with pytest.raises(ConfigError, match="--items 0 is out of range"):
        cloze_items(documents, limit=0)


def test_same_items_in_every_process(items):
    # Written down, so that an order that depends on the process (sets, hashes) would show.
    assert [(item.candidates, item.answer) for item in items[:3]] == [
        ((" green", " brown", " quick", " jumps"), 3),
        ((" foxes", " over", " brown", " while"), 1),
        ((" foxes", " birds", " seven", " lazy"), 3),
    ]


def test_what_cannot_be_asked(model, make_model, tokenizer, items):
    with pytest.raises(DataError, match="no cloze items"):
        cloze_accuracy(model, tokenizer, [])
    with pytest.raises(DataError, match="outside the model's vocabulary of 32 ids"):
        cloze_accuracy(make_model(vocab=32), tokenizer, items)
    rare = ClozeItem("the quick", (" brown", " xylophone", " dog", " green"), 0)
    with pytest.raises(ConfigError, match="--window 1 is shorter than a candidate of"):
        cloze_accuracy(model, tokenizer, [rare], window=1)
    with pytest.raises(ConfigError, match="window 65 is out of range"):
        cloze_accuracy(model, tokenizer, items, window=65)
