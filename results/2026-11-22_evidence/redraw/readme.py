"""The measured tables of this result's README: header line → lines of cells."""

from __future__ import annotations

import math
from collections.abc import Sequence

import published
from claims import NAME
from runs import KINDS, Estimate, Runs, text_of
from sections import EIGHTS, LENGTH_PATTERN, LESS, at_the_end, decided

REMARKS = {("bf16", "5:8", "1.2M"): " (see below)"}
SIZES = {"1.2M": "study-1m", "4.7M": "study-5m", "20M": "study-20m"}
# (size, tokens a weight, what was run there); the 4.7M models stand beside the 20M ones.
REMEMBERED = (
    ("20M", 8, ("bf16 dense", "bf16 6:8", "bf16 4:8", "bitnet dense", "bitnet 6:8", "bitnet 4:8")),
    ("20M", 25, ("bf16 dense", "bf16 4:8", "bitnet 4:8")),
    ("4.7M", 100, ("bf16 dense", "bf16 4:8", "bitnet 4:8")),
)


def tables(every: Sequence[Runs]) -> dict[str, list[list[str]]]:
    runs = {one.name: one for one in every}
    columns = [(kind, size) for size in SIZES for kind in KINDS]
    names = ", ".join(SIZES)
    assert names == "1.2M, 4.7M, 20M"
    header = " | ".join(
        [
            "pattern",
            *(f"{NAME[kind]}, {size}" for kind, size in columns),
            "published 0.5B: BF16 | BitNet",
        ]
    )
    return {
        f"| {header} |": _ratios(runs),
        "| tokens a weight | steps | BF16 | BitNet | BF16 − BitNet, by seed | loses less |": (
            _lengths(runs["study-1m-2"])
        ),
        "| weights | model | passes over the text | training | held-out | difference | "
        "held-out perplexity |": _remembered(runs),
    }


def _ratios(runs: dict[str, Runs]) -> list[list[str]]:
    columns = [(kind, size) for size in SIZES for kind in KINDS]
    dense = [runs[SIZES[size]].perplexity(kind=kind, pattern="dense") for kind, size in columns]
    lines = [["dense (perplexity)", *(_text(one, 2) for one in dense), "", ""]]
    for pattern in EIGHTS:
        ours = [
            _text(runs[SIZES[size]].ratio(kind, pattern), 3)
            + REMARKS.get((kind, pattern, size), "")
            for kind, size in columns
        ]
        theirs = [f"{published.NORMALISED_PPL[kind][pattern]:.2f}" for kind in KINDS]
        lines.append([pattern, *ours, *theirs])
    return lines


def _lengths(runs: Runs) -> list[list[str]]:
    lines = []
    for length in runs.lengths(LENGTH_PATTERN):
        at = {"tokens_per_weight": length}
        ratios = [_text(runs.ratio(kind, LENGTH_PATTERN, **at), 3) for kind in KINDS]
        gap = runs.advantage(LENGTH_PATTERN, **at)
        assert gap is not None
        steps = ", ".join(f"{n:,}" for n in runs.steps(length))
        lines.append([f"{length:g}", steps, *ratios, _text(gap, 3, True), LESS[decided(gap)]])
    return lines


def _remembered(runs: dict[str, Runs]) -> list[list[str]]:
    lines = []
    for size, length, models in REMEMBERED:
        for number, model in enumerate(models):
            kind, pattern = model.split()
            row = runs[SIZES[size]].one(kind=kind, pattern=pattern, tokens_per_weight=length)
            assert row is not None
            training = at_the_end(row.series("loss")[1])
            held_out = math.log(row.perplexity)
            passes = row.raw["tokens"] / sum(row.raw["data"]["train"])
            lines.append(
                [
                    "" if number else size,
                    f"{NAME[kind]} {pattern}",
                    f"{passes:.2g}",
                    f"{training:.3f}",
                    f"{held_out:.3f}",
                    text_of(Estimate((held_out - training,)), 3, True).partition(" ")[0],
                    f"{row.perplexity:.2f}",
                ]
            )
    return lines


def _text(estimate: Estimate | None, digits: int, sign: bool = False) -> str:
    return "" if estimate is None else estimate.text(digits, sign, seeds=False)
