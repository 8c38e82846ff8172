"""What a picture's reader relies on: one look for one name, and numbers that can be read."""

from __future__ import annotations

import pytest

from sparse_bitnet.study.plots import Curve, _looks, _plain_ticks


def test_a_label_looks_the_same_in_every_panel() -> None:
    """A kind without a dense run must not draw its 4:8 as the other draws dense."""

    def panel(*labels: str) -> list[Curve]:
        return [Curve(label, [1, 2], [3, 4]) for label in labels]

    short_first = _looks({"BitNet": panel("4:8"), "BF16": panel("dense", "4:8")})
    assert short_first == _looks({"BF16": panel("dense", "4:8"), "BitNet": panel("4:8")})
    assert list(short_first) == ["dense", "4:8"]
    assert short_first["dense"] != short_first["4:8"]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.2, 30.0, ["2", "5", "10", "20"]),
        (0.1, 30.0, ["0.1", "1", "10"]),
    ],
)
def test_logarithmic_axes_have_few_plain_numbers(
    low: float, high: float, expected: list[str]
) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(4, 3))
    axis = figure.subplots()
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    _plain_ticks(axis)
    figure.canvas.draw()
    inside = [low <= x <= high for x in axis.get_xticks()]
    labels = [tick.get_text() for tick in axis.get_xticklabels()]
    shown = [text for text, seen in zip(labels, inside, strict=True) if seen]
    assert shown == expected
    assert not any(tick.get_text() for tick in axis.get_xticklabels(minor=True))
