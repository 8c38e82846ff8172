import json

import pytest

from sparse_bitnet.core import ConfigError, DataError
from sparse_bitnet.data import open_source
from sparse_bitnet.evaluate import (
    Measurements,
    Perplexity,
    Report,
    cloze_accuracy,
    cloze_items,
    measure,
    perplexity,
)


def test_everything_that_is_asked_for(model, tokenizer, prose, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": prose}) + "\n", encoding="utf-8")
    source = f"jsonl:{tmp_path / 'a.jsonl'}"
    found = measure(
        model, tokenizer, Measurements(text=source, cloze=source, window=32, items=5, limit=50)
    )
    assert found.text == perplexity(
        model, open_source(source), tokenizer=tokenizer, window=32, limit=50
    )
    items = cloze_items([prose], limit=5)
    assert found.cloze == cloze_accuracy(model, tokenizer, items, window=32)
    assert found.shards is None
    assert set(json.loads(json.dumps(found.as_dict()))) == {"text", "cloze"}
    first, second = str(found).splitlines()
    assert first == f"text: {found.text}"
    assert second == str(found.cloze)


def test_lines_of_tasks():
    report = Report(
        shards=Perplexity.of(2.0, 2),
        tasks={
            "quiz": {"acc": 0.5, "acc_stderr": 0.1, "match,strict": 0.25},
            "other": {"match,strict": 0.5, "match_stderr,strict": 0.01},
        },
    )
    assert str(report).splitlines() == [
        "shards: perplexity 2.72 (loss 1.0000 nats/token) over 2 tokens",
        "quiz: acc 0.5000 ± 0.1000",
        "quiz: match,strict 0.2500",
        "other: match,strict 0.5000 ± 0.0100",
    ]


def test_wrong_requests_fail_before_any_work(model, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="nothing to measure: give --shards, --text, --cloze or"):
        measure(model, tokenizer, Measurements())
    (tmp_path / "a.txt").write_text("some text", encoding="utf-8")
    text = f"text:{tmp_path / 'a.txt'}"
    with pytest.raises(DataError, match="does not exist"):
        measure(model, tokenizer, Measurements(text=text, cloze="jsonl:missing.jsonl"))
    with pytest.raises(DataError, match="no such directory"):
        measure(model, tokenizer, Measurements(shards=tmp_path / "none", text=text))
