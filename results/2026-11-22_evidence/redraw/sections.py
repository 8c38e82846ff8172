"""The plots and tables of this result, one function a topic and one call a size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import figures
import published
from claims import NAME, NOT_DECIDED, claim_about_size, claims, decided
from runs import KINDS, Estimate, Runs, crossings, dead_zone_groups, signed, text_of
from sparse_bitnet.core import Pattern
from sparse_bitnet.study import plots
from sparse_bitnet.study.cells import METHODS
from sparse_bitnet.study.plots import Curve, Histogram
from sparse_bitnet.study.polarization import block_number
from sparse_bitnet.study.rows import Row

EIGHTS = tuple(published.NORMALISED_PPL["bf16"])
LENGTH_PATTERN = "4:8"
LESS = {1: "BitNet", -1: "BF16", 0: NOT_DECIDED}
# Patterns of one density and different group sizes, the smaller group first.
SAME_DENSITY = (("2:4", "4:8"), ("3:4", "6:8"))
LOSS_SHOWN = 1.6  # times the lowest final loss: how far up the loss curves are drawn
SMOOTH = 5  # logged steps that a point of a loss curve averages
LAST = 0.05  # part of training whose loss is compared with that on held-out text
UNIT = "training tokens per weight"


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A topic of one size: PNGs by name, and tables."""

    title: str
    pictures: dict[str, bytes] = field(default_factory=dict)
    tables: Sequence[Table] = ()


def verdicts(by_size: Sequence[Runs]) -> Section:
    """One line a claim and size; a size beside the main one counts where it has measured."""
    main, *others = by_size
    lines = []
    for here, *elsewhere in zip(*(claims(runs) for runs in by_size), strict=True):
        lines.append((here.claim, main.label, here.ours, here.verdict, here.published))
        lines += [
            ("", runs.label, one.ours, one.verdict, "")
            for runs, one in zip(others, elsewhere, strict=True)
            if not one.missing
        ]
    size = claim_about_size(by_size)
    lines.append((size.claim, "all", size.ours, size.verdict, size.published))
    header = ("claim", "size", "here", "verdict", f"published ({published.SOURCE})")
    return Section("Published claims and what we find", tables=[Table(header, lines)])


def delta_by_size(by_size: Sequence[Runs]) -> Section:
    """Perplexity at 6:8 minus the dense model's, by size, beside the published sizes."""
    lines = []
    for runs in sorted(by_size, key=lambda one: one.weights):
        dense = [runs.perplexity(kind=k, pattern="dense") for k in KINDS]
        deltas = [runs.delta(k, "6:8") for k in KINDS]
        lines.append(
            (
                runs.label,
                f"{runs.main_length:g}",
                *(text_of(one) for one in dense),
                *(text_of(one, 2, True) for one in deltas),
            )
        )
    for size in published.DELTA_PPL_6_8["bf16"]:
        deltas = (signed(published.DELTA_PPL_6_8[k][size]) for k in KINDS)
        lines.append((f"{size} (published)", "–", "–", "–", *deltas))
    header = (
        *("size", "tokens per weight"),
        *(f"{NAME[k]} dense" for k in KINDS),
        *(f"Δ {NAME[k]} 6:8" for k in KINDS),
    )
    return Section("ΔPPL at 6:8 by size", tables=[Table(header, lines)])


def collapse(runs: Runs) -> Section:
    """Normalised perplexity against the pattern, ours and the published curve."""
    title = "Where sparsity breaks the model"
    curves = []
    for kind in KINDS:
        found = [(i, runs.ratio(kind, p)) for i, p in enumerate(EIGHTS)]
        ours = [(i, e) for i, e in found if e is not None]
        curves.append(
            Curve(
                f"{NAME[kind]}, {runs.label}",
                [i for i, _ in ours],
                [e.mean for _, e in ours],
                [e.spread for _, e in ours],
                kind,
                seeds=[e.values for _, e in ours],
            )
        )
    if all(len(curve.x) < 2 for curve in curves):
        return Section(title)
    for kind, values in published.NORMALISED_PPL.items():
        x = [EIGHTS.index(p) for p in values]
        label = f"{NAME[kind]}, published 0.5B"
        curves.append(figures.Published(label, x, list(values.values()), None, kind))
    picture = figures.collapse(
        curves, EIGHTS, published.COLLAPSE_AT, f"Normalised perplexity, {runs.label}"
    )
    theirs = published.NORMALISED_PPL
    shown = dict.fromkeys([*EIGHTS, *runs.patterns()])
    header = ("pattern", *(f"{NAME[k]}, {whose}" for whose in ("ours", "published") for k in KINDS))
    table = Table(
        header,
        [
            (
                p,
                *(text_of(runs.ratio(k, p), 3) for k in KINDS),
                *(f"{theirs[k][p]:.2f}" if p in theirs[k] else "–" for k in KINDS),
            )
            for p in sorted(shown, key=lambda p: -Pattern.parse(p).density)
        ],
    )
    return Section(title, {"collapse": picture}, [table])


def tokens_per_weight(runs: Runs) -> Section:
    """Normalised perplexity at 4:8 against training length: where do the kinds cross?"""
    title = f"Normalised perplexity at {LENGTH_PATTERN} against training length"
    found: dict[str, dict[float, Estimate]] = {kind: {} for kind in KINDS}
    lengths = runs.lengths(LENGTH_PATTERN)
    for kind in KINDS:
        for length in lengths:
            ratio = runs.ratio(kind, LENGTH_PATTERN, tokens_per_weight=length)
            if ratio is not None:
                found[kind][length] = ratio
    if len(lengths) < 2:
        return Section(title)
    curves = []
    for kind, points in found.items():
        # Beside points with a spread, a single seed's is none.
        seeds = 2 if any(len(e.values) > 1 for e in points.values()) else 1
        drawn = {x: e for x, e in points.items() if len(e.values) >= seeds}
        curves.append(
            Curve(
                NAME[kind],
                list(drawn),
                [e.mean for e in drawn.values()],
                [e.spread for e in drawn.values()],
                kind,
                seeds=[e.values for e in drawn.values()],
            )
        )
    gaps = {x: runs.advantage(LENGTH_PATTERN, tokens_per_weight=x) for x in lengths}
    lines = []
    for x in lengths:
        gap = gaps[x]
        steps = ", ".join(f"{n:,}" for n in runs.steps(x)) or "–"
        ratios = [text_of(found[kind].get(x), 3) for kind in KINDS]
        less = LESS[decided(gap)] if gap else "–"
        lines.append((f"{x:g}", steps, *ratios, text_of(gap, 3, True), less))
    header = (
        *("tokens per weight", "optimizer steps"),
        *(NAME[k] for k in KINDS),
        *("BF16 − BitNet, by seed", "loses less"),
    )
    several = {x: gap for x, gap in gaps.items() if gap and len(gap.values) > 1}
    meet = crossings(list(several), [gap.mean for gap in several.values()])
    lines.append(("the means cross at", ", ".join(f"{x:.0f}" for x in meet) or "–", *4 * ("",)))
    table = Table(header, lines)
    if all(len(curve.x) < 2 for curve in curves):
        return Section(title, tables=[table])
    picture = plots.lines(
        [curve for curve in curves if curve.x],
        f"Cost of {LENGTH_PATTERN}, {runs.label}",
        UNIT,
        "perplexity / that of the dense model",
        log_x=True,
        ticks={x: f"{x:g}" for x in lengths},
    )
    return Section(title, {"length": picture}, [table])


def cloze(runs: Runs) -> Section:
    """Accuracy of choosing a paragraph's last word among four, in percent."""
    lines = []
    patterns = ["dense", *runs.patterns()]
    found: dict[str, dict[str, Estimate]] = {kind: {} for kind in KINDS}
    for pattern in patterns:
        for kind in KINDS:
            values = [r.accuracy for r in runs.select(kind=kind, pattern=pattern)]
            known = tuple(100 * v for v in values if v is not None)
            if known:
                found[kind][pattern] = Estimate(known)
        lines.append((pattern, *(text_of(found[k].get(pattern), 1) for k in KINDS)))
    shown = [p for p in patterns if all(p in found[kind] for kind in KINDS)]
    picture = figures.bars(
        shown,
        {kind: [found[kind][p].mean for p in shown] for kind in KINDS},
        {kind: [found[kind][p].spread for p in shown] for kind in KINDS},
        f"Cloze accuracy, {runs.label}",
        "accuracy, % (25 is chance)",
        base=25.0,
    )
    table = Table(("pattern", *(NAME[k] for k in KINDS)), lines)
    return Section("Downstream stand-in: the last word of a paragraph", {"cloze": picture}, [table])


def group_size(runs: Runs) -> Section:
    """Does the group size matter at equal density?"""
    title = "Does the group size matter?"
    lines, labels = [], []
    pair: dict[str, list[Estimate]] = {"smaller group": [], "larger group": []}
    for kind in KINDS:
        for small, large in SAME_DENSITY:
            ratios = runs.ratio(kind, small), runs.ratio(kind, large)
            if ratios[0] and ratios[1]:
                gap = runs.excess({"kind": kind, "pattern": large}, kind=kind, pattern=small)
                spread = runs.perplexity(kind=kind, pattern=large)
                texts = [text_of(one, 3) for one in ratios]
                lines.append(
                    (
                        NAME[kind],
                        f"{small} | {large}",
                        *texts,
                        text_of(gap, 2, True),
                        f"{spread.spread:.2f}" if spread else "–",
                    )
                )
                labels.append(f"{NAME[kind]} {small} | {large}")
                for name, ratio in zip(pair, ratios, strict=True):
                    pair[name].append(ratio)
    if not lines:
        return Section(title)
    picture = figures.bars(
        labels,
        {name: [e.mean for e in values] for name, values in pair.items()},
        {name: [e.spread for e in values] for name, values in pair.items()},
        f"Equal density, different group, {runs.label}",
        "perplexity / dense",
        base=1.0,
    )
    header = (
        *("kind", "patterns", "smaller group", "larger group"),
        *("ΔPPL, smaller − larger", "spread of the larger"),
    )
    return Section(title, {"group-size": picture}, [Table(header, lines)])


def ablations(runs: Runs) -> Section:
    """Perplexity minus the published method's, same pattern and seed."""
    methods = [name for name in METHODS if name != "published"]
    patterns = {r.cell.pattern for r in runs.rows if r.cell.method != "published"}
    values: dict[str, dict[str, Estimate]] = {}
    for pattern in sorted(patterns, key=lambda p: -Pattern.parse(p).density):
        for name in methods:
            here = {"kind": "bitnet", "pattern": pattern}
            gap = runs.excess(here, **here, method=name)
            if gap is not None:
                values.setdefault(pattern, {})[name] = gap
    if not values:
        return Section("Ablations")
    picture = figures.bars(
        [name.replace("-", " ") for name in methods],
        {p: [gaps[name].mean for name in methods] for p, gaps in values.items()},
        {p: [gaps[name].spread for name in methods] for p, gaps in values.items()},
        f"Perplexity above the published method, {runs.label}",
        "ΔPPL",
        digits=1,
    )
    lines = [
        (name, *(text_of(values[p].get(name), 2, True) for p in values), _published_ablation(name))
        for name in methods
    ]
    header = ("ablation", *(f"ΔPPL at {p}" for p in values), "published, 6:8")
    return Section("Ablations", {"ablations": picture}, [Table(header, lines)])


def _published_ablation(name: str) -> str:
    if name not in published.ABLATIONS_PPL:
        return "–"
    value, base = published.ABLATIONS_PPL[name], published.ABLATIONS_PPL["published"]
    return "worse" if value is None or base is None else signed(value - base)


def dense_to_sparse(runs: Runs) -> Section:
    """Dense first, or down a staircase of patterns, against sparse from scratch."""
    title = "Dense first, then sparse"
    cells = sorted(
        {(r.cell.pattern, r.cell.until) for r in runs.rows if r.cell.until},
        key=lambda one: (-Pattern.parse(one[0]).density, len(one[1]), one[1]),
    )
    lines, labels, gaps, spreads = [], [], [], []
    for pattern, until in cells:
        here = {"kind": "bitnet", "pattern": pattern}
        gap = runs.excess(here, **here, until=until)
        ours, scratch = runs.perplexity(**here, until=until), runs.perplexity(**here)
        if gap is None or ours is None or scratch is None:
            continue
        parts = [f"{p} to {fraction:.0%}" for fraction, p in until]
        labels.append("\n".join([pattern, *parts]))
        gaps.append(gap)
        spreads.append(scratch.spread)
        texts = text_of(ours), text_of(scratch), text_of(gap, 2, True)
        lines.append((pattern, ", ".join(parts), *texts))
    if not lines:
        return Section(title)
    picture = figures.bars(
        labels,
        {"bitnet": [gap.mean for gap in gaps]},
        {"bitnet": [gap.spread for gap in gaps]},
        f"Perplexity above sparse from scratch, {runs.label}",
        "ΔPPL",
        digits=2,
        band=spreads if all(spreads) else (),
    )
    table = Table(("final pattern", "before", "perplexity", "from scratch", "ΔPPL"), lines)
    return Section(title, {"dense-to-sparse": picture}, [table])


def learning_rate(runs: Runs) -> Section:
    """Is either dense model held back by its learning rate?"""
    title = "Learning rate of the dense models"
    found = {kind: runs.rates(kind) for kind in KINDS}
    if all(len(rates) < 2 for rates in found.values()):
        return Section(title)

    def text(kind: str, rate: float) -> str:
        used = " (used)" if runs.main_rate[kind] == rate else ""
        return f"{found[kind][rate]:.2f}{used}" if rate in found[kind] else "–"

    shown = sorted({rate for rates in found.values() for rate in rates})
    lines = [(f"{rate:g}", *(text(kind, rate) for kind in KINDS)) for rate in shown]
    return Section(title, tables=[Table(("learning rate", *(NAME[k] for k in KINDS)), lines)])


def losses(runs: Runs) -> Section:
    """Training loss of some patterns, and how far held-out text is from it."""
    groups = {
        NAME[kind]: [
            Curve(row.cell.pattern, _length(runs, tokens), _smooth(values))
            for row in _shown(runs, kind)
            for tokens, values in [row.series("loss")]
        ]
        for kind in KINDS
    }
    ends = [curve.y[-1] for curves in groups.values() for curve in curves]
    picture = _panels(
        runs, "Training loss", groups, "nats per token", log_x=True, top=LOSS_SHOWN * min(ends)
    )
    lines = []
    for length in sorted({r.cell.tokens_per_weight for r in runs.rows}):
        for pattern in ("dense", *runs.patterns()):
            cell = {"pattern": pattern, "tokens_per_weight": length}
            found = [
                Estimate(tuple(_held_out(row) for row in rows)) if rows else None
                for kind in KINDS
                for rows in [runs.select(kind=kind, **cell)]
            ]
            if any(found):
                lines.append((f"{length:g}", pattern, *(text_of(one, 3, True) for one in found)))
    header = ("tokens per weight", "held-out − training", *(NAME[k] for k in KINDS))
    return Section("Training loss", {"loss": picture}, [Table(header, lines)])


def _held_out(row: Row) -> float:
    """Loss on held-out text minus that of the last training batches, nats a token."""
    return math.log(row.perplexity) - at_the_end(row.series("loss")[1])


def at_the_end(values: Sequence[float]) -> float:
    """Mean over the last :data:`LAST` of training."""
    last = values[-max(1, round(LAST * len(values))) :]
    return sum(last) / len(last)


def mask_cost(runs: Runs) -> Section:
    """What the mask costs over training: loss minus the dense model's, on the same batches.

    A panel for each pattern; where there is but one, for each training length.
    """
    title = "What the mask costs, over training"
    patterns = runs.drawn()[1:]
    places = [(pattern, pattern, runs.main_length) for pattern in patterns]
    if len(patterns) == 1:
        (only,) = patterns
        places = [(f"{only}, {x:g} tokens per weight", only, x) for x in runs.lengths(only)]
    groups: dict[str, list[Curve]] = {}
    lines = []
    for panel, pattern, length in places:
        ends: list[str] = []
        for kind in KINDS:
            trained: list[float] = []
            held_out: list[float] = []
            at = {"kind": kind, "tokens_per_weight": length}
            dense = {row.cell.seed: row for row in runs.select(pattern="dense", **at)}
            label = NAME[kind]
            for row in sorted(runs.select(pattern=pattern, **at), key=lambda r: r.cell.seed):
                baseline = dense.get(row.cell.seed)
                if baseline is None:
                    continue
                before = dict(zip(*baseline.series("loss"), strict=True))
                both = [(t, v - before[t]) for t, v in zip(*row.series("loss"), strict=True)]
                gap = [v for _, v in both]
                curve = Curve(label, _length(runs, [t for t, _ in both]), _smooth(gap), kind=kind)
                groups.setdefault(panel, []).append(curve)
                label = ""
                trained.append(at_the_end(gap))
                held_out.append(math.log(row.perplexity / baseline.perplexity))
            found = [Estimate(tuple(values)) if values else None for values in (trained, held_out)]
            ends += [text_of(one, 3, True) for one in found]
        lines.append((panel, *ends))
    picture = _panels(runs, title, groups, "nats per token", log_x=True)
    columns = (f"{NAME[kind]}, {on}" for kind in KINDS for on in ("training", "held-out"))
    return Section(title, {"mask-cost": picture}, [Table(("pattern", *columns), lines)])


def flips(runs: Runs) -> Section:
    """How much of the mask one optimizer step changes, in percent."""
    groups = {
        NAME[kind]: [
            Curve(row.cell.pattern, _length(runs, tokens), [100 * v for v in values])
            for row in _shown(runs, kind)
            for tokens, values in [row.series("flip_rate")]
            if any(v > 0 for v in values)
        ]
        for kind in KINDS
    }
    title = "Mask flip rate"
    return Section(title, {"flips": _panels(runs, title, groups, "% of the mask a step")})


def zeros(runs: Runs) -> Section:
    """Weights that round to zero before any mask: over training, and by layer at the end."""
    curves = [
        Curve(row.cell.pattern, _length(runs, tokens), [100 * v for v in values])
        for row in _shown(runs, "bitnet")
        for tokens, values in [row.series("zeros")]
    ]
    title = f"Zeros before the mask, BitNet {runs.label}"
    pictures = {"zeros": plots.lines(curves, title, UNIT, "% of weights with |w| ≤ γ/2")}
    panels: dict[str, list[Curve]] = {}
    for row in _shown(runs, "bitnet"):
        by_linear: dict[str, dict[int, float]] = {}
        layers = row.raw["layers"]
        for name, value in zip(layers["names"], layers["zeros"][-1], strict=True):
            linear, block = name.removesuffix(".weight").rpartition(".")[2], block_number(name)
            if block is not None:
                by_linear.setdefault(linear, {})[block] = 100 * value
        for linear, blocks in by_linear.items():
            if linear in ("q_proj", "o_proj", "gate_proj", "down_proj"):
                curve = Curve(row.cell.pattern, list(blocks), list(blocks.values()))
                panels.setdefault(linear, []).append(curve)
    title = f"Zeros by layer at the end, BitNet {runs.label}"
    pictures["zeros-by-layer"] = plots.panels(panels, title, "decoder block", "% zeros")
    return Section("Zeros before the mask", pictures)


def polarization(runs: Runs) -> Section:
    """|w|/γ and the pruning thresholds: early and late layers, both kinds, over training."""
    wanted = ("6:8", "4:8", *runs.patterns())
    pattern = next(p for p in wanted if runs.one(kind="bitnet", pattern=p))
    chosen = {kind: runs.one(kind=kind, pattern=pattern) for kind in KINDS}
    at_end, over, lines = [], [], []
    for kind, row in chosen.items():
        if row is None:
            continue
        found = row.polarization
        last = [one for one in found if one["fraction"] == max(s["fraction"] for s in found)]
        at_end.append(
            [
                _histogram(f"{NAME[kind]}, {name}", one, kind)
                for position, name in (("early", "first block"), ("late", "last block"))
                for one in last
                if one["position"] == position
            ]
        )
        over.append(
            [
                _histogram(f"{NAME[kind]}, {one['fraction']:.0%} of training", one, kind)
                for one in found
                if one["position"] == "all"
            ]
        )
        lines.append((NAME[kind], pattern, f"{dead_zone_groups(row):.1%}"))
    title = f"{pattern}, {runs.label}"
    pictures = {
        "polarization": plots.polarization(at_end, f"|w|/γ at the end, {title}"),
        "polarization-training": plots.polarization(over, f"|w|/γ over training, {title}"),
    }
    table = Table(("kind", "pattern", "groups whose threshold is in the dead zone"), lines)
    return Section("Weight polarization", pictures, [table])


def _histogram(title: str, one: dict[str, Any], kind: str) -> Histogram:
    return Histogram(title, one, kind)


def _panels(
    runs: Runs, title: str, groups: dict[str, list[Curve]], ylabel: str, **more: Any
) -> bytes:
    groups = {name: curves for name, curves in groups.items() if curves}
    return plots.panels(groups, f"{title}, {runs.label}", UNIT, ylabel, **more)


def _shown(runs: Runs, kind: str) -> list[Row]:
    """The first seed of the patterns that curves are drawn for."""
    found = (runs.one(kind=kind, pattern=pattern) for pattern in runs.drawn())
    return [row for row in found if row is not None]


def _length(runs: Runs, tokens: Sequence[float]) -> list[float]:
    """Tokens per weight, which compares across sizes."""
    return [t / runs.weights for t in tokens]


def _smooth(values: Sequence[float]) -> list[float]:
    windows = (values[max(0, i - SMOOTH + 1) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
