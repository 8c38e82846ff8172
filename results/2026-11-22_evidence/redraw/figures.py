"""Plots that only this result has, in the style of :mod:`sparse_bitnet.study.plots`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from sparse_bitnet.study.plots import (
    COLOR,
    CYCLE,
    GREY,
    NAME,
    Curve,
    draw_curve,
    png,
    styled,
    subplots,
)


class Published(Curve):
    """A curve of the paper, drawn hollow and dashed."""


HOLLOW = {"linestyle": "--", "linewidth": 1.2, "markerfacecolor": "white", "alpha": 0.75}


@styled
def collapse(curves: Sequence[Curve], patterns: Sequence[str], limit: float, title: str) -> bytes:
    """Normalised perplexity against the pattern, with the line that is called collapse."""
    figure, ((axis,),) = subplots(1, 1, 7.0, 4.4)
    for curve in curves:
        draw_curve(axis, curve, **(HOLLOW if isinstance(curve, Published) else {}))
    axis.axhline(limit, color=GREY, linewidth=1, linestyle=":")
    axis.annotate(
        f"+{limit - 1:.0%}", (0, limit), xytext=(-4, 3), textcoords="offset points", color=GREY
    )
    axis.set_xticks(range(len(patterns)), list(patterns))
    axis.set(xlabel="pattern", ylabel="perplexity / that of the dense model", title=title)
    axis.legend()
    return png(figure)


@styled
def bars(
    labels: Sequence[str],
    groups: Mapping[str, Sequence[float]],
    errors: Mapping[str, Sequence[float]],
    title: str,
    ylabel: str,
    *,
    base: float = 0.0,
    digits: int | None = None,
    band: Sequence[float] = (),
) -> bytes:
    """Grouped bars with error bars, growing from ``base`` (1 for a ratio).

    Args:
        errors: half-lengths; 0, which is what one seed has, draws none.
        digits: writes each bar's value beside it.
        band: a grey area of this half-height around ``base`` behind each label's bars.
    """
    width = min(9.6, max(5.6, 1.1 * len(labels) + 2.4))
    figure, ((axis,),) = subplots(1, 1, width, 4.0)
    width = 0.8 / max(1, len(groups))
    for index, half in enumerate(band):
        edges = [index - 0.5, index + 0.5]
        axis.fill_between(edges, base - half, base + half, color="#ececec", lw=0)
    for index, (name, values) in enumerate(groups.items()):
        x = [i - 0.4 + width * (index + 0.5) for i in range(len(labels))]
        drawn = axis.bar(
            x,
            [v - base for v in values],
            width * 0.92,
            bottom=base,
            yerr=[error or math.nan for error in errors[name]],
            capsize=3,
            color=COLOR.get(name, CYCLE[(index + 1) % len(CYCLE)]),
            hatch="//" if index % 2 else "",
            edgecolor="white",
            error_kw={"ecolor": "#333333", "elinewidth": 1},
            label=NAME.get(name, name),
        )
        if digits is not None:
            texts = [f"{value - base:+.{digits}f}".replace("-", "−") for value in values]
            axis.bar_label(drawn, texts, padding=3, fontsize=8, color="#333333")
    axis.axhline(base, color="#888888", linewidth=0.8)
    axis.set_xticks(range(len(labels)), list(labels))
    axis.grid(visible=False, axis="x")
    axis.margins(y=0.1)
    axis.set(title=title, ylabel=ylabel)
    if len(groups) > 1:
        axis.legend()
    return png(figure)
