"""Rows as a finished sweep would leave them, made up, and tokens for real toy sweeps."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparse_bitnet.data import prepare
from sparse_bitnet.study.cells import Cell
from sparse_bitnet.study.rows import append_row
from sparse_bitnet.train.recipe import checked

RATIO = {
    "bf16": {"7:8": 1.01, "6:8": 1.04, "5:8": 1.06, "4:8": 1.13, "3:8": 1.3, "2:8": 1.5},
    "bitnet": {"7:8": 1.0, "6:8": 1.02, "5:8": 1.03, "4:8": 1.07, "3:8": 1.15, "2:8": 1.3},
}
DENSE = {"bf16": 27.0, "bitnet": 34.0}


def make_row(perplexity: float, accuracy: float | None = 0.5, **cell: Any) -> dict[str, Any]:
    """One row with everything a report draws, its curves short and smooth."""
    chosen = checked(Cell, {"size": "study-5m", **cell}, "test")
    points = [1e6 * (i + 1) for i in range(12)]
    bitnet = chosen.kind == "bitnet"
    masked = chosen.pattern != "dense"
    bins = 80
    edges = [4 * i / bins for i in range(bins + 1)]
    fractions = [1 / bins] * bins
    return {
        "schema": 1,
        "key": str(chosen),
        "status": "done",
        "cell": chosen.to_dict(),
        "weights": 4_718_592,
        "tokens": 12_000_000,
        "seconds": 100.0,
        "tokens_per_second": 4.5e6,
        "environment": {"device": "test", "torch": "2", "commit": "abcdef"},
        "validation": {"loss": 3.0, "perplexity": perplexity, "tokens": 1000},
        "cloze": None if accuracy is None else {"accuracy": accuracy, "questions": 100},
        "history": {
            "tokens": points,
            "loss": [9 - 0.4 * i for i in range(12)],
            "zeros": [0.3 + 0.01 * i for i in range(12)],
            "flip_rate": [0.01 / (i + 1) if masked else None for i in range(12)],
        },
        "polarization": [
            {
                "fraction": fraction,
                "position": position,
                "pattern": "6:8",
                "edges": edges,
                "magnitudes": fractions,
                "thresholds": fractions,
                "zeros_before_mask": 0.4,
                "dead_zone_groups": 0.9 if bitnet else 0.5,
                "kurtosis": 2.0,
            }
            for fraction in (0.0, 0.5, 1.0)
            for position in ("early", "late", "all")
        ],
    }


@pytest.fixture(name="make_row")
def _make_row() -> Callable[..., dict[str, Any]]:
    return make_row


@pytest.fixture
def evidence(tmp_path: Path) -> Path:
    """A directory with rows of the whole grid: the published order, with a little noise."""
    noise = random.Random(0)

    def add(perplexity: float, **cell: Any) -> None:
        accuracy = 0.5 - 0.05 * (perplexity / DENSE[cell["kind"]] - 1)
        row = make_row(perplexity * (1 + noise.gauss(0, 1e-3)), accuracy, **cell)
        append_row(tmp_path / "rows.jsonl", row)

    for kind, dense in DENSE.items():
        for seed in (0, 1, 2):
            add(dense, kind=kind, pattern="dense", seed=seed)
            for pattern, ratio in RATIO[kind].items():
                add(dense * ratio, kind=kind, pattern=pattern, seed=seed)
        for pattern, twin in (("2:4", "4:8"), ("3:4", "6:8")):
            add(1.01 * dense * RATIO[kind][twin], kind=kind, pattern=pattern)
        for length, cost in ((4, 1.02), (16, 1.05), (64, 1.1)):
            worse = cost if kind == "bf16" else 1.06
            for seed in (0, 1) if length < 64 else (0,):
                run = {"kind": kind, "seed": seed, "tokens_per_weight": length}
                add(2 * dense, pattern="dense", **run)
                add(2 * dense * worse, pattern="4:8", **run)
    for method in (
        "mask-then-quant",
        "mask-from-quantized",
        "masked-gradient",
        "4-bit-activations",
    ):
        add(36.0, kind="bitnet", pattern="6:8", method=method)
    for part in (0.25, 0.5, 0.75):
        add(36.0, kind="bitnet", pattern="6:8", until={part: "dense"})
    return tmp_path


@pytest.fixture(scope="session")
def toy_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared tokens of a few thousand made-up sentences, vocabulary 300."""
    directory = tmp_path_factory.mktemp("toy")
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(200)]
    for split, documents in (("train", 60), ("held", 12)):
        texts = [" ".join(draw.choices(words, k=150)) for _ in range(documents)]
        (directory / split).mkdir()
        for number, text in enumerate(texts):
            (directory / split / f"{number}.txt").write_text(text)
    out = directory / "tokens"
    prepare(
        f"text:{directory / 'train'}/*.txt",
        out,
        vocab_size=300,
        validation_source=f"text:{directory / 'held'}/*.txt",
        workers=1,
    )
    return out
