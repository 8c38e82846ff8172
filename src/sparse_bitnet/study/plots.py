"""Every picture of a report, drawn with matplotlib (extra ``plot``) and returned as PNG.

Colours are those of Okabe and Ito, which people with any common colour blindness tell apart; line
style and marker say the same thing again. BF16 is vermilion and round, BitNet is blue and square,
everywhere, and these two colours mean nothing else where kinds are compared.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparse_bitnet.core import MissingExtraError

try:
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter
    from matplotlib.transforms import ScaledTranslation
except ImportError as error:
    raise MissingExtraError("plots need matplotlib: pip install 'sparse-bitnet[plot]'") from error

COLOR = {"bf16": "#D55E00", "bitnet": "#0072B2"}
MARKER = {"bf16": "o", "bitnet": "s"}
NAME = {"bf16": "BF16", "bitnet": "BitNet"}
GREY = "#666666"
CYCLE = ("#000000", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8B6914")
STYLES = ("-", "--", "-.", ":")
DPI = 150
SEEDS_BESIDE = 6  # points from an error bar

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
# The whole drawing in it: matplotlib asks for most of a style only when it is used.
styled = mpl.rc_context(STYLE)


@dataclass(frozen=True)
class Curve:
    """A line of a plot."""

    label: str  # an empty one stays out of the legend
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None  # half-lengths of error bars
    kind: str = ""  # sets the looks
    seeds: Sequence[Sequence[float]] = ()  # behind each point, dots where there are several


@dataclass(frozen=True)
class Histogram:
    """|w|/γ of some weights beside the pruning thresholds of their groups."""

    title: str
    # ``edges``; ``magnitudes`` and, if it is sparse, ``thresholds`` as fractions a bin
    bins: Mapping[str, Any]
    kind: str


@styled
def lines(
    curves: Sequence[Curve],
    title: str,
    xlabel: str,
    ylabel: str,
    *,
    log_x: bool = False,
    ticks: Mapping[float, str] | None = None,
) -> bytes:
    """Curves over one horizontal axis."""
    figure, ((axis,),) = subplots(1, 1, 7.0, 4.2)
    looks = _looks({"": [curve for curve in curves if not curve.kind]})
    for curve in curves:
        if curve.kind:
            draw_curve(axis, curve, markers=len(curve.x) <= 12)
        else:
            axis.plot(curve.x, curve.y, label=curve.label, **looks[curve.label])
    if log_x:
        axis.set_xscale("log", base=2)
    if ticks:
        axis.set_xticks(list(ticks), list(ticks.values()))
        axis.minorticks_off()
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axis.legend(ncols=2 if len(curves) > 6 else 1)
    return png(figure)


@styled
def panels(
    groups: Mapping[str, Sequence[Curve]],
    title: str,
    xlabel: str,
    ylabel: str,
    log_x: bool = False,
    top: float | None = None,
) -> bytes:
    """One panel a group, axes shared and cut off at ``top``; up to three beside each other.

    Colours are by kind, else by the curve's label: the same in all panels.
    """
    columns = len(groups) if len(groups) <= 3 else 2
    rows = math.ceil(len(groups) / columns)
    width = {1: 7.0, 2: 8.4}.get(columns, 9.6)
    figure, grid = subplots(rows, columns, width, 3.4 * rows + 0.4, share=True)
    shown: list[str] = []
    looks = _looks(groups)
    for axis, (name, curves) in zip(grid.flat, groups.items(), strict=False):
        for curve in curves:
            style = looks[curve.label]
            if curve.kind:
                dashes = "-" if curve.kind == "bf16" else "--"
                style = {"color": COLOR[curve.kind], "linestyle": dashes}
            axis.plot(curve.x, curve.y, label=curve.label or None, linewidth=1.3, **style)
        axis.set(title=name, xlabel=xlabel)
        if log_x:
            axis.set_xscale("log")
        labels = [curve.label for curve in curves if curve.label]
        if not set(labels) <= set(shown):
            axis.legend()
            shown = labels
    for axis in grid.flat[len(groups) :]:
        axis.set_visible(False)
    for axis in grid[:, 0]:
        axis.set_ylabel(ylabel)
    if top is not None:
        every = [curve for curves in groups.values() for curve in curves]
        inside = [x for c in every for x, y in zip(c.x, c.y, strict=True) if y <= top]
        for axis in grid.flat:
            axis.set_ylim(top=top)
            axis.set_xlim(left=0.9 * min(inside))
    if log_x:
        for axis in grid.flat:
            _plain_ticks(axis)
    return png(figure, title)


def _looks(groups: Mapping[str, Sequence[Curve]]) -> dict[str, dict[str, str]]:
    """Label → colour and line style, by the label's place among those of all groups.

    The group with most labels decides their order, so that one which lacks a curve adds none.
    """
    every = sorted(groups.values(), key=len, reverse=True)
    labels = dict.fromkeys(curve.label for curves in every for curve in curves)
    return {
        label: {"color": CYCLE[i % len(CYCLE)], "linestyle": STYLES[i % len(STYLES)]}
        for i, label in enumerate(labels)
    }


def _plain_ticks(axis: Any) -> None:
    """Plain numbers on a logarithmic axis: at 1, 2 and 5 below two decades, else at powers of 10.

    Left alone, matplotlib writes 2 × 10⁰, 3 × 10⁰, … over each other where there is one decade.
    """
    low, high = axis.get_xlim()
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())


@styled
def polarization(rows: Sequence[Sequence[Histogram]], title: str) -> bytes:
    """Histograms in rows and columns: |w|/γ filled, thresholds as a line, the dead zone shaded."""
    columns = max(map(len, rows))
    figure, grid = subplots(
        len(rows), columns, min(9.6, 2.9 * columns + 0.5), 2.3 * len(rows) + 0.6
    )
    for axes, row in zip(grid, rows, strict=True):
        for axis, one in zip(axes, row, strict=False):
            _polarization(axis, one)
        for axis in axes[len(row) :]:
            axis.set_visible(False)
        axes[0].set_ylabel("density")
    for axis in grid[-1]:
        axis.set_xlabel("|w| / γ")
    grid[0, 0].legend(fontsize=8)
    return png(figure, title)


def _polarization(axis: Any, one: Histogram) -> None:
    # The last bin also holds everything beyond it, so it is left out of the picture.
    edges, widths = one.bins["edges"][:-1], np.diff(one.bins["edges"])
    density = np.divide(one.bins["magnitudes"], widths)[:-1]
    axis.axvspan(0, 0.5, color="#f0e442", alpha=0.25, linewidth=0, label="dead zone, |w| ≤ γ/2")
    colour = COLOR.get(one.kind, CYCLE[2])
    axis.stairs(density, edges, fill=True, color=colour, alpha=0.45, label="|w|/γ")
    thresholds = one.bins.get("thresholds") or []
    if any(thresholds):
        cut = np.divide(thresholds, widths)[:-1]
        # Thresholds lie closer together than weights: scaled to the same height to be seen.
        scaled = cut / (cut.max() or 1) * density.max()
        axis.stairs(scaled, edges, color="#000000", linewidth=1.3, label="thresholds (scaled)")
    axis.set_xlim(0, 3)
    axis.set_title(one.title, fontsize=9)


def draw_curve(axis: Any, curve: Curve, markers: bool = True, **looks: Any) -> None:
    """With error bars; ``looks`` are matplotlib's, beside those of the kind."""
    colour = COLOR.get(curve.kind, GREY)
    axis.errorbar(
        curve.x,
        curve.y,
        # One seed has no spread to show.
        yerr=None if curve.error is None else [error or math.nan for error in curve.error],
        label=curve.label,
        color=colour,
        capsize=3,
        marker=MARKER.get(curve.kind, "^") if markers else None,
        markersize=5.5,
        **{"linewidth": 1.9} | looks,
    )
    # Single seeds beside the error bars, those of the two kinds on either side.
    points = -SEEDS_BESIDE if curve.kind == "bf16" else SEEDS_BESIDE
    beside = axis.transData + ScaledTranslation(points / 72, 0, axis.figure.dpi_scale_trans)
    for x, values in zip(curve.x, curve.seeds, strict=False):
        if len(values) > 1:
            axis.scatter(
                [x] * len(values), values, s=9, color=colour, alpha=0.6, lw=0, transform=beside
            )


def subplots(rows: int, columns: int, width: float, height: float, share: bool = False) -> Any:
    """A figure, its sizes in inches, and its axes ``[rows, columns]``."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharey=share)


def png(figure: Figure, title: str = "") -> bytes:
    """The figure as PNG; ``title`` stands above all its panels."""
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", wrap=True)
    buffer = io.BytesIO()
    # No Software entry: the same rows give the same bytes with every matplotlib release's name.
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
