"""Sections of a report about what happens during training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sparse_bitnet.study import plots
from sparse_bitnet.study.analysis import Estimate, Runs, text_of
from sparse_bitnet.study.cells import KINDS
from sparse_bitnet.study.page import Figure, Section, Table
from sparse_bitnet.study.plots import NAME, Curve, Histogram
from sparse_bitnet.study.polarization import block_number
from sparse_bitnet.study.rows import Row, is_number

MILLION = 1e6
LOSS_SHOWN = 1.6  # times the lowest final loss: how far up the loss curves are drawn
SMOOTH = 5  # logged steps that a point of a loss curve averages
LAST = 0.05  # part of training whose loss is held against that on held-out text


def losses(runs: Runs) -> Section:
    """Training loss of some patterns, BF16 beside BitNet, and how far held-out text is from it."""
    groups = {
        NAME[kind]: [
            Curve(row.cell.pattern, _length(runs, tokens), _smooth(values))
            for row in _shown(runs, kind)
            for tokens, values in [row.series("loss")]
            if len(values) > 1
        ]
        for kind in KINDS
    }
    ends = [curve.y[-1] for curves in groups.values() for curve in curves]
    section = _curves(
        runs,
        "loss",
        "Training loss",
        f"Loss of the training batches, mean over {SMOOTH} logged steps; the first steps lie above "
        "the picture.",
        groups,
        "nats per token",
        "training loss",
        log_x=True,
        top=LOSS_SHOWN * min(ends) if ends else None,
    )
    lines = _remembered(runs)
    if not lines:
        return section
    passes = sorted({f"{n:.2g}" for row in runs.select() if (n := _passes(row))}, key=float)
    note = (
        "Table: loss on held-out text minus that of the training batches, nats a token, over the "
        f"last {LAST:.0%} of training"
        + (f", after {' or '.join(passes)} passes over its text" if passes else "")
        + ". It grows as a model comes to remember its text. How hard the two texts are differs "
        "too, which a run of less than one pass shows alone."
    )
    table = Table(("held-out − training", *(NAME[k] for k in KINDS)), lines)
    return replace(section, tables=[table], notes=[*section.notes, note])


def _remembered(runs: Runs) -> list[tuple[str, ...]]:
    """Lines of a table: what each kind and pattern knows by heart, dense first."""
    lines = []
    for pattern in ("dense", *runs.patterns()):
        gaps = [
            tuple(
                gap
                for row in runs.select(kind=kind, pattern=pattern)
                if (gap := _held_out(row)) is not None
            )
            for kind in KINDS
        ]
        if any(gaps):
            told = [text_of(Estimate(found) if found else None, 3, True) for found in gaps]
            lines.append((pattern, *told))
    return lines


def _held_out(row: Row) -> float | None:
    """Nats a token; None where a loss was not logged."""
    _, logged = row.series("loss")
    if not logged or row.perplexity <= 0:
        return None
    return math.log(row.perplexity) - _at_the_end(logged)


def _at_the_end(values: Sequence[float]) -> float:
    """Mean over the last :data:`LAST` of training."""
    last = values[-max(1, round(LAST * len(values))) :]
    return sum(last) / len(last)


def _passes(row: Row) -> float | None:
    """How often training went through its text; None where the row does not say."""
    data, tokens = row.raw.get("data"), row.raw.get("tokens")
    counts = data.get("train") if isinstance(data, dict) else None
    if not isinstance(counts, list) or not all(map(is_number, [*counts, tokens])):
        return None
    return float(tokens or 0) / sum(counts) if sum(counts) > 0 else None


def mask_cost(runs: Runs) -> Section:
    """What the mask costs over training: loss minus the dense twin's, on the same batches.

    A panel for each pattern; where there is but one, for each training length.
    """
    patterns = runs.drawn()[1:]
    places = [(pattern, pattern, runs.main_length) for pattern in patterns]
    if len(patterns) == 1:
        (only,) = patterns
        places = [(f"{only}, {x:g} tokens per weight", only, x) for x in runs.lengths(only)]
    groups: dict[str, list[Curve]] = {}
    lines = []
    for title, pattern, length in places:
        ends: list[str] = []
        for kind in KINDS:
            trained: list[float] = []
            held_out: list[float] = []
            at = {"kind": kind, "tokens_per_weight": length}
            dense = {row.cell.seed: row for row in runs.select(pattern="dense", **at)}
            masked = runs.select(pattern=pattern, **at)
            label = NAME[kind]
            for row in sorted(masked, key=lambda one: one.cell.seed):
                twin = dense.get(row.cell.seed)
                tokens, gap = _gap(row, twin)
                if twin is not None and len(gap) > SMOOTH and twin.perplexity > 0 < row.perplexity:
                    curve = Curve(label, _length(runs, tokens), _smooth(gap), kind=kind)
                    groups.setdefault(title, []).append(curve)
                    label = ""
                    trained.append(_at_the_end(gap))
                    held_out.append(math.log(row.perplexity / twin.perplexity))
            both = [Estimate(tuple(found)) if found else None for found in (trained, held_out)]
            ends += [text_of(one, 3, True) for one in both]
        if title in groups:
            lines.append((title, *ends))
    text = (
        "Training loss minus that of the dense model of the same seed, which saw the same batches: "
        f"one line a seed, mean over {SMOOTH} logged steps. The table has the mean over the last "
        f"{LAST:.0%}, and the same difference on held-out text. Where the text was passed many "
        "times and training shows more, the dense model has learnt more of it by heart than the "
        "masked one, and held-out text probably shows less than the mask costs with fresh text."
    )
    ylabel, what = "nats per token", "training loss above that of the dense twin"
    section = _curves(
        runs, "mask-cost", "What the mask costs, over training", text, groups, ylabel, what, True
    )
    columns = (f"{NAME[kind]}, {on}" for kind in KINDS for on in ("training", "held-out"))
    return replace(section, tables=[Table(("pattern", *columns), lines)] if lines else [])


def _gap(row: Row, dense: Row | None) -> tuple[list[float], list[float]]:
    """(tokens, loss minus the twin's) where both were logged."""
    if dense is None:
        return [], []
    tokens, losses_here = row.series("loss")
    twin = dict(zip(*dense.series("loss"), strict=True))
    both = [(t, loss - twin[t]) for t, loss in zip(tokens, losses_here, strict=True) if t in twin]
    return [t for t, _ in both], [gap for _, gap in both]


def flips(runs: Runs) -> Section:
    """How much of the mask one optimizer step changes."""
    groups = {
        NAME[kind]: [
            Curve(row.cell.pattern, _length(runs, tokens), [100 * v for v in values])
            for row in _shown(runs, kind)
            for tokens, values in [row.series("flip_rate")]
            if len(values) > 1 and any(v > 0 for v in values)
        ]
        for kind in KINDS
    }
    return _curves(
        runs,
        "flips",
        "Mask flip rate",
        "Mask entries that one optimizer step changes, in percent.",
        groups,
        "% of the mask a step",
        "flip rate over training",
    )


def zeros(runs: Runs) -> Section:
    """Weights that round to zero before any mask: over training, and by layer at the end."""
    over_time = [
        Curve(row.cell.pattern, _length(runs, tokens), [100 * v for v in values])
        for row in _shown(runs, "bitnet")
        for tokens, values in [row.series("zeros")]
        if len(values) > 1
    ]
    title = "Zeros before the mask"
    if not over_time:
        return Section("zeros", title, notes=["Needs bitnet runs of the main grid."])
    png = plots.lines(
        over_time,
        f"Zeros before the mask, BitNet {runs.label}",
        _unit(runs),
        "% of weights with |w| ≤ γ/2",
    )
    figures = [
        Figure(
            "zeros",
            png,
            "Line plot of the percentage of weights that round to zero, over training. At the end: "
            + ", ".join(f"{c.label} {c.y[-1]:.1f} %" for c in over_time),
        )
    ]
    by_layer = _by_layer(runs)
    if by_layer:
        png = plots.panels(
            by_layer, f"Zeros by layer at the end, BitNet {runs.label}", "decoder block", "% zeros"
        )
        patterns = next(iter(by_layer.values()))
        alt = "Line plots of zeros before the mask by decoder block, one panel for each linear: "
        alt += f"{', '.join(by_layer)}; patterns {', '.join(c.label for c in patterns)}"
        figures.append(Figure("zeros-by-layer", png, alt))
    return Section(
        "zeros",
        title,
        "Percentage of weights that are ternary zeros without any mask. Where it exceeds what the "
        "pattern removes, a mask has little left to take.",
        figures,
    )


def polarization(runs: Runs) -> Section:
    """|w|/γ and the pruning thresholds: early and late layers, both kinds, over training."""
    title = "Weight polarization"
    wanted = ("6:8", "4:8", *runs.patterns())
    pattern = next((p for p in wanted if runs.one(kind="bitnet", pattern=p)), None)
    chosen = {k: runs.one(kind=k, pattern=pattern) for k in KINDS} if pattern else {}
    rows = {kind: row for kind, row in chosen.items() if row is not None and row.snapshots}
    if not rows:
        return Section("polarization", title, notes=["Needs bf16 and bitnet with a pattern."])
    positions = [("early", "first block"), ("late", "last block")]
    grid = []
    for kind, row in rows.items():
        last = max(one["fraction"] for one in row.snapshots)
        grid.append(
            [
                _histogram(f"{NAME[kind]}, {name}", one, kind)
                for position, name in positions
                for one in row.snapshots
                if one["position"] == position and one["fraction"] == last
            ]
        )
    over = [
        [
            _histogram(f"{NAME[kind]}, {one['fraction']:.0%} of training", one, kind)
            for one in row.snapshots
            if one["position"] == "all"
        ]
        for kind, row in rows.items()
    ]
    figures = []
    if any(grid):
        png = plots.polarization(
            [row for row in grid if row], f"|w|/γ at the end, {pattern}, {runs.label}"
        )
        alt = "Histograms of weight magnitude over γ with the pruning thresholds, first and last "
        alt += f"block, {' and '.join(NAME[k] for k in rows)}. {_shares(rows)}"
        figures.append(Figure("polarization", png, alt))
    if any(len(row) > 1 for row in over):
        png = plots.polarization(
            [row for row in over if row], f"|w|/γ over training, {pattern}, {runs.label}"
        )
        alt = "Histograms of weight magnitude over γ at several fractions of training, one row for "
        alt += "each of " + " and ".join(NAME[k] for k in rows)
        figures.append(Figure("polarization-training", png, alt))
    return Section(
        "polarization",
        title,
        "Filled: distribution of |w|/γ. Line: distribution of the groups' pruning thresholds, "
        "scaled to the same height. Yellow: the dead zone, where ternary weights are zero anyway, "
        f"so that a threshold there costs nothing. {_shares(rows)}",
        figures,
    )


def _curves(
    runs: Runs,
    name: str,
    title: str,
    text: str,
    groups: dict[str, list[Curve]],
    ylabel: str,
    what: str,
    log_x: bool = False,
    top: float | None = None,
) -> Section:
    groups = {kind: curves for kind, curves in groups.items() if curves}
    if not groups:
        return Section(name, title, notes=["Needs runs of the main grid with a history."])
    png = plots.panels(groups, f"{title}, {runs.label}", _unit(runs), ylabel, log_x=log_x, top=top)
    ends = "; ".join(
        f"{kind}: "
        + ", ".join(f"{c.label} {c.y[-1]:.4g}".strip().replace("-", "−") for c in curves)
        for kind, curves in groups.items()
    )
    return Section(
        name, title, text, [Figure(name, png, f"Line plots of {what}. At the end: {ends}")]
    )


def _shown(runs: Runs, kind: str) -> list[Row]:
    """The first seed of the patterns that curves are drawn for."""
    found = (runs.one(kind=kind, pattern=pattern) for pattern in runs.drawn())
    return [row for row in found if row is not None]


def _by_layer(runs: Runs) -> dict[str, list[Curve]]:
    """Linear's name → a curve over blocks for each pattern, at the end of training."""
    panels: dict[str, list[Curve]] = {}
    for row in _shown(runs, "bitnet"):
        by_linear: dict[str, dict[int, float]] = {}
        for name, value in row.zeros_by_layer.items():
            linear, block = name.removesuffix(".weight").rpartition(".")[2], block_number(name)
            if block is not None:
                by_linear.setdefault(linear, {})[block] = 100 * value
        for linear, blocks in by_linear.items():
            if len(blocks) > 1 and linear in ("q_proj", "o_proj", "gate_proj", "down_proj"):
                panels.setdefault(linear, []).append(
                    Curve(row.cell.pattern, list(blocks), list(blocks.values()))
                )
    return panels


def _histogram(title: str, one: dict[str, Any], kind: str) -> Histogram:
    return Histogram(title, one["edges"], one["magnitudes"], one.get("thresholds") or [], kind)


def _shares(rows: dict[str, Row]) -> str:
    parts = []
    for kind, row in rows.items():
        share = row.final_statistic("dead_zone_groups")
        if share is not None:
            parts.append(f"{NAME[kind]} {share:.1%}")
    return f"Groups whose threshold is in the dead zone: {', '.join(parts)}." if parts else ""


def _length(runs: Runs, tokens: Sequence[float]) -> list[float]:
    """Tokens per weight, which compares across sizes; millions where the weights are not known."""
    return [t / (runs.weights or MILLION) for t in tokens]


def _unit(runs: Runs) -> str:
    return "training tokens per weight" if runs.weights else "training tokens, millions"


def _smooth(values: Sequence[float]) -> list[float]:
    return [
        sum(values[max(0, i - SMOOTH + 1) : i + 1]) / len(values[max(0, i - SMOOTH + 1) : i + 1])
        for i in range(len(values))
    ]
