"""Every picture of a report, drawn with matplotlib (extra ``plot``) and returned as PNG.

Colours are those of Okabe and Ito, which people with any common colour blindness tell apart; line
style and marker say the same thing again. BF16 is vermilion and round, BitNet is blue and square,
everywhere; what is published is hollow and dashed.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sparse_bitnet.core import MissingExtraError

COLOUR = {"bf16": "#D55E00", "bitnet": "#0072B2"}
MARKER = {"bf16": "o", "bitnet": "s"}
NAME = {"bf16": "BF16", "bitnet": "BitNet"}
GREY = "#666666"
CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8B6914")
STYLES = ("-", "--", "-.", ":")
DPI = 150

STYLE: Any = {
    "figure.facecolor": "white",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


@dataclass(frozen=True)
class Curve:
    """A line of a plot; ``error`` are half-lengths of error bars, ``kind`` sets the looks."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None
    kind: str = ""
    published: bool = False


@dataclass(frozen=True)
class Histogram:
    """|w|/γ of some weights beside the pruning thresholds of their groups, as fractions a bin."""

    title: str
    edges: Sequence[float]
    magnitudes: Sequence[float]
    thresholds: Sequence[float]
    kind: str


def collapse(curves: Sequence[Curve], patterns: Sequence[str], limit: float, title: str) -> bytes:
    """Normalised perplexity against the pattern, with the line that is called collapse."""
    figure, (axis,) = _figure(1, width=7.0, height=4.4)
    for curve in curves:
        _draw(axis, curve)
    axis.axhline(limit, color=GREY, linewidth=1, linestyle=":")
    axis.annotate(
        f"+{limit - 1:.0%}", (0, limit), xytext=(-4, 3), textcoords="offset points", color=GREY
    )
    axis.set_xticks(range(len(patterns)), list(patterns))
    axis.set(xlabel="pattern", ylabel="perplexity / that of the dense model", title=title)
    axis.legend()
    return _png(figure)


def lines(
    curves: Sequence[Curve],
    title: str,
    xlabel: str,
    ylabel: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
    mark: float | None = None,
    ticks: Mapping[float, str] | None = None,
) -> bytes:
    """Curves over one horizontal axis; ``mark`` draws a vertical line there."""
    figure, (axis,) = _figure(1, width=7.0, height=4.2)
    plain = 0
    for curve in curves:
        if curve.kind or curve.published:
            _draw(axis, curve, markers=len(curve.x) <= 12)
        else:
            style = {"color": CYCLE[plain % len(CYCLE)], "linestyle": STYLES[plain % len(STYLES)]}
            axis.plot(curve.x, curve.y, label=curve.label, **style)
            plain += 1
    if log_x:
        axis.set_xscale("log", base=2)
    if log_y:
        axis.set_yscale("log")
    if ticks:
        axis.set_xticks(list(ticks), list(ticks.values()))
        axis.minorticks_off()
    if mark is not None:
        axis.axvline(mark, color=GREY, linewidth=1, linestyle=":")
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axis.legend(ncols=2 if len(curves) > 6 else 1)
    return _png(figure)


def panels(
    groups: Mapping[str, Sequence[Curve]], title: str, xlabel: str, ylabel: str, log_y: bool = False
) -> bytes:
    """One panel a group, axes shared, colours by the curve's place in its group."""
    figure, axes = _figure(len(groups), width=3.6 * len(groups) + 0.6, height=3.8, share=True)
    for axis, (name, curves) in zip(axes, groups.items(), strict=True):
        for index, curve in enumerate(curves):
            style = {"color": CYCLE[index % len(CYCLE)], "linestyle": STYLES[index % len(STYLES)]}
            axis.plot(curve.x, curve.y, label=curve.label, linewidth=1.4, **style)
        axis.set(title=name, xlabel=xlabel)
        if log_y:
            axis.set_yscale("log")
        axis.legend()
    axes[0].set_ylabel(ylabel)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return _png(figure)


def bars(
    labels: Sequence[str],
    groups: Mapping[str, Sequence[float]],
    errors: Mapping[str, Sequence[float]],
    title: str,
    ylabel: str,
    base: float = 0.0,
) -> bytes:
    """Grouped bars with error bars, growing from ``base`` (1 for a ratio)."""
    figure, (axis,) = _figure(1, width=max(5.0, 1.1 * len(labels) + 2.4), height=4.0)
    width = 0.8 / max(1, len(groups))
    for index, (name, values) in enumerate(groups.items()):
        x = [i - 0.4 + width * (index + 0.5) for i in range(len(labels))]
        axis.bar(
            x,
            [v - base for v in values],
            width * 0.92,
            bottom=base,
            yerr=list(errors[name]),
            capsize=3,
            color=COLOUR.get(name, CYCLE[index % len(CYCLE)]),
            hatch="//" if index % 2 else "",
            edgecolor="white",
            error_kw={"ecolor": "#333333", "elinewidth": 1},
            label=NAME.get(name, name),
        )
    axis.axhline(base, color="#888888", linewidth=0.8)
    axis.set_xticks(range(len(labels)), list(labels))
    axis.set(title=title, ylabel=ylabel)
    if len(groups) > 1:
        axis.legend()
    return _png(figure)


def polarization(grid: Sequence[Sequence[Histogram]], title: str) -> bytes:
    """Histograms in rows and columns: |w|/γ filled, thresholds as a line, the dead zone shaded."""
    rows, columns = len(grid), max(len(row) for row in grid)
    figure, axes = _grid(rows, columns)
    for axis_row, row in zip(axes, grid, strict=True):
        for axis in axis_row[len(row) :]:
            axis.set_visible(False)
        for axis, one in zip(axis_row, row, strict=False):
            _polarization(axis, one)
    for axis in axes[-1]:
        axis.set_xlabel("|w| / γ")
    for axis_row in axes:
        axis_row[0].set_ylabel("density")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return _png(figure)


def _polarization(axis: Any, one: Histogram) -> None:
    # The last bin also holds everything beyond it, so it is left out of the picture.
    edges = list(one.edges)
    widths = [b - a for a, b in pairwise(edges)]
    colour = COLOUR.get(one.kind, CYCLE[2])
    density = [f / w for f, w in zip(one.magnitudes, widths, strict=True)][:-1]
    axis.axvspan(0, 0.5, color="#f0e442", alpha=0.25, linewidth=0, label="dead zone, |w| ≤ γ/2")
    axis.stairs(density, edges[:-1], fill=True, color=colour, alpha=0.45, label="|w|/γ")
    if any(one.thresholds):
        cut = [f / w for f, w in zip(one.thresholds, widths, strict=True)][:-1]
        peak = max(cut)
        # Thresholds lie closer together than weights: scaled to the same height to be seen.
        scaled = [c / peak * max(density) for c in cut] if peak else cut
        axis.stairs(scaled, edges[:-1], color="#000000", linewidth=1.3, label="thresholds (scaled)")
    axis.set_xlim(0, 3)
    axis.set_title(one.title, fontsize=9)


def _draw(axis: Any, curve: Curve, markers: bool = True) -> None:
    colour = COLOUR.get(curve.kind, GREY)
    axis.errorbar(
        curve.x,
        curve.y,
        yerr=curve.error,
        label=curve.label,
        color=colour,
        capsize=3,
        linestyle="--" if curve.published else "-",
        linewidth=1.2 if curve.published else 1.9,
        marker=MARKER.get(curve.kind, "^") if markers else None,
        markersize=5.5,
        markerfacecolor="white" if curve.published else colour,
        alpha=0.75 if curve.published else 1.0,
    )


def _figure(
    columns: int, width: float, height: float, share: bool = False
) -> tuple[Any, list[Any]]:
    figure, axes = _subplots(1, columns, width, height, share)
    return figure, list(axes[0])


def _grid(rows: int, columns: int) -> tuple[Any, list[list[Any]]]:
    return _subplots(rows, columns, 2.9 * columns + 0.5, 2.3 * rows + 0.6, False)


def _subplots(
    rows: int, columns: int, width: float, height: float, share: bool
) -> tuple[Any, list[list[Any]]]:
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "plots need matplotlib: pip install 'sparse-bitnet[plot]'"
        ) from error
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, sharey=share)
    return figure, [list(row) for row in axes]


def _png(figure: Any) -> bytes:
    import matplotlib as mpl

    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        # No Software entry: the same rows give the same bytes with every matplotlib release's name.
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
