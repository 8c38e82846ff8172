"""Sections of a report about how good the models are."""

from __future__ import annotations

from collections.abc import Sequence

from sparse_bitnet.core import Pattern
from sparse_bitnet.study import plots, published
from sparse_bitnet.study.analysis import Estimate, Runs, crossings, signed, text_of
from sparse_bitnet.study.cells import KINDS
from sparse_bitnet.study.claims import decided
from sparse_bitnet.study.page import Figure, Section, Table, needs
from sparse_bitnet.study.plots import NAME, Curve

EIGHTS = tuple(published.NORMALISED_PPL["bf16"])
LENGTH_PATTERN = "4:8"
LESS = {1: "BitNet", -1: "BF16", 0: "not decided"}
SEEDS = "Lines and error bars: mean and standard deviation over seeds; dots beside: single seeds."


def collapse(runs: Runs) -> Section:
    """Normalised perplexity against the pattern, ours and the published curve."""
    curves, cells = [], []
    for kind in KINDS:
        found = [(i, runs.ratio(kind, p)) for i, p in enumerate(EIGHTS)]
        ours = [(i, e) for i, e in found if e is not None]
        if ours:
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
        cells += [f"{kind} {p}" for p, (_, e) in zip(EIGHTS, found, strict=True) if e is None]
    notes = needs("bf16 and bitnet at dense and each N:8", cells)
    title = "Where sparsity breaks the model"
    text = "Perplexity of each model over that of the same model without a mask, by pattern."
    table = _ratios(runs)
    if all(len(curve.x) < 2 for curve in curves):
        tables = [table] if table.rows else []
        return Section("collapse", title, text if tables else "", tables=tables, notes=notes)
    for kind, values in published.NORMALISED_PPL.items():
        x = [EIGHTS.index(p) for p in values]
        label = f"{NAME[kind]}, published 0.5B"
        curves.append(Curve(label, x, list(values.values()), None, kind, published=True))
    png = plots.collapse(
        curves, EIGHTS, published.COLLAPSE_AT, f"Normalised perplexity, {runs.label}"
    )
    alt = "Line plot of perplexity over that of the dense model against the pattern. " + " ".join(
        f"{curve.label}: "
        + ", ".join(f"{EIGHTS[int(i)]} {y:.3f}" for i, y in zip(curve.x, curve.y, strict=True))
        + "."
        for curve in curves
    )
    caption = f"{SEEDS} Dotted: the +10 % line that the paper calls collapse."
    return Section(
        "collapse",
        title,
        text,
        [Figure("collapse", png, alt, caption)],
        [table],
        notes,
    )


def _ratios(runs: Runs) -> Table:
    """Every measured pattern, and of N:8 all that are published once one of them was measured."""
    told = published.NORMALISED_PPL
    found = {
        p: [runs.ratio(k, p) for k in KINDS] for p in dict.fromkeys([*EIGHTS, *runs.patterns()])
    }
    every = any(any(found[p]) for p in EIGHTS)
    shown = [p for p, ours in found.items() if any(ours) or (every and p in EIGHTS)]
    header = ("pattern", *(f"{NAME[k]}, {whose}" for whose in ("ours", "published") for k in KINDS))
    return Table(
        header,
        [
            (
                p,
                *(text_of(one, 3) for one in found[p]),
                *(f"{told[k][p]:.2f}" if p in told[k] else "–" for k in KINDS),
            )
            for p in sorted(shown, key=lambda p: -Pattern.parse(p).density)
        ],
    )


def delta_by_size(by_size: Sequence[Runs]) -> Section:
    """ΔPPL at 6:8 by size, beside the published sizes."""
    rows = [
        (
            f"{size} (published)",
            *("–", "–", "–"),
            *(signed(published.DELTA_PPL_6_8[k][size]) for k in KINDS),
        )
        for size in published.DELTA_PPL_6_8["bf16"]
    ]
    ours = []
    for runs in sorted(by_size, key=lambda one: one.weights):
        dense = [runs.perplexity(kind=k, pattern="dense") for k in KINDS]
        deltas = [runs.delta(k, "6:8") for k in KINDS]
        if any(deltas):
            ours.append(
                (
                    runs.label,
                    f"{runs.main_length:g}",
                    *(text_of(one) for one in dense),
                    *(text_of(one, 2, True) for one in deltas),
                )
            )
    header = (
        *("size", "tokens per weight"),
        *(f"{NAME[k]} dense" for k in KINDS),
        *(f"Δ {NAME[k]} 6:8" for k in KINDS),
    )
    notes = [] if ours else needs("bf16 and bitnet at dense and 6:8", ["all"])
    return Section(
        "delta",
        "ΔPPL at 6:8 by size",
        "Perplexity at 6:8 minus that of the same model without a mask.",
        tables=[Table(header, [*ours, *rows])] if ours else [],
        notes=notes,
    )


def tokens_per_weight(runs: Runs) -> Section:
    """Normalised perplexity at 4:8 against training length: where do the kinds cross?"""
    title = f"Normalised perplexity at {LENGTH_PATTERN} against training length"
    found: dict[str, dict[float, Estimate]] = {}
    for kind in KINDS:
        ratios = {
            length: runs.ratio(kind, LENGTH_PATTERN, tokens_per_weight=length)
            for length in runs.lengths(LENGTH_PATTERN)
        }
        found[kind] = {length: ratio for length, ratio in ratios.items() if ratio is not None}
    curves = {}
    for kind, points in found.items():
        seeds = _enough(list(points.values()))
        drawn = {x: e for x, e in points.items() if len(e.values) >= seeds}
        curves[kind] = Curve(
            NAME[kind],
            list(drawn),
            [e.mean for e in drawn.values()],
            [e.spread for e in drawn.values()],
            kind,
            seeds=[e.values for e in drawn.values()],
        )
    missing = [f"{kind} at more lengths" for kind in KINDS if len(curves[kind].x) < 2]
    wanted = f"dense and {LENGTH_PATTERN} of both kinds at several lengths, all with seeds or none"
    notes = needs(wanted, missing)
    lengths = sorted({x for kind in KINDS for x in found[kind]})
    if len(lengths) < 2:
        return Section("length", title, notes=notes)
    paired = {x: runs.advantage(LENGTH_PATTERN, tokens_per_weight=x) for x in lengths}
    gaps = {x: gap for x, gap in paired.items() if gap is not None}
    told = _who_loses_less(gaps)
    rows = [
        (
            f"{x:g}",
            ", ".join(f"{n:,}" for n in runs.steps(x)) or "–",
            *(text_of(found[kind].get(x), 3) for kind in KINDS),
            text_of(gaps.get(x), 3, True),
            LESS[decided(gaps[x])] if x in gaps else "–",
        )
        for x in lengths
    ]
    header = (
        *("tokens per weight", "optimizer steps"),
        *(NAME[k] for k in KINDS),
        *("BF16 − BitNet, by seed", "loses less"),
    )
    figures = []
    shown = [curve for curve in curves.values() if curve.x]
    if any(len(curve.x) > 1 for curve in shown):  # beside it another's only point is worth a look
        png = plots.lines(
            shown,
            f"Cost of {LENGTH_PATTERN}, {runs.label}",
            "training tokens per weight",
            "perplexity / that of the dense model",
            log_x=True,
            ticks={x: f"{x:g}" for x in lengths},
        )
        alt = f"Line plot of normalised perplexity against tokens per weight. {told} " + " ".join(
            f"{curve.label}: "
            + ", ".join(f"{x:g} {y:.3f}" for x, y in zip(curve.x, curve.y, strict=True))
            + "."
            for curve in shown
        )
        figures.append(Figure("length", png, alt, SEEDS))
    return Section(
        "length",
        title,
        f"Each point is a run of its own with its own schedule. {told}",
        figures,
        [Table(header, rows)],
        notes,
    )


def _enough(points: Sequence[Estimate]) -> int:
    """Seeds of a point of a curve: beside points with a spread, a single seed's is none."""
    return 2 if any(len(one.values) > 1 for one in points) else 1


def _who_loses_less(gaps: dict[float, Estimate]) -> str:
    """Where the means cross, and what of it seeds decide by the rule of the claims."""
    seeds = _enough(list(gaps.values()))
    gaps = {x: gap for x, gap in gaps.items() if len(gap.values) >= seeds}
    if len(gaps) < 2:
        return "Too few lengths, or too few of them with several seeds, to see a crossing."
    meet = crossings(list(gaps), [gap.mean for gap in gaps.values()])
    places = " and ".join(f"{x:.0f}" for x in meet)
    told = f"The means cross at about {places} tokens per weight. " if meet else ""
    told = told or "The means do not cross in this range. "
    sure = {x: sign for x, gap in gaps.items() if (sign := decided(gap))}
    if not sure:
        return told + "Seeds decide at none of the lengths which kind loses less."
    parts = [
        f"{LESS[sign]} at {', '.join(f'{x:g}' for x in sure if sure[x] == sign)}"
        for sign in (1, -1)
        if sign in sure.values()
    ]
    left = [f"{x:g}" for x in gaps if x not in sure]
    undecided = f"; at {', '.join(left)} they do not decide" if left else ""
    return f"{told}By seeds, {' and '.join(parts)} loses less{undecided}."


def cloze(runs: Runs) -> Section:
    """Accuracy of choosing a paragraph's last word among four."""
    patterns = ["dense", *runs.patterns()]
    rows, cells = [], []
    found: dict[str, dict[str, Estimate]] = {kind: {} for kind in KINDS}
    for pattern in patterns:
        for kind in KINDS:
            values = [r.accuracy for r in runs.select(kind=kind, pattern=pattern)]
            known = tuple(100 * v for v in values if v is not None)
            if known:
                found[kind][pattern] = Estimate(known)
            else:
                cells.append(f"{kind} {pattern}")
        if any(pattern in found[kind] for kind in KINDS):
            rows.append((pattern, *(text_of(found[k].get(pattern), 1) for k in KINDS)))
    title = "Downstream stand-in: the last word of a paragraph"
    notes = needs("cloze accuracy", cells)
    shown = [p for p in patterns if all(p in found[kind] for kind in KINDS)]
    if not rows:
        return Section("cloze", title, notes=notes)
    figures = []
    # One pattern, for want of the others' twins, would show the kinds and nothing of the mask.
    if len(shown) > 1:
        png = plots.bars(
            shown,
            {kind: [found[kind][p].mean for p in shown] for kind in KINDS},
            {kind: [found[kind][p].spread for p in shown] for kind in KINDS},
            f"Cloze accuracy, {runs.label}",
            "accuracy, % (25 is chance)",
            base=25.0,
        )
        alt = "Bars of cloze accuracy in percent by pattern: " + "; ".join(
            f"{p}: BF16 {found['bf16'][p].mean:.1f}, BitNet {found['bitnet'][p].mean:.1f}"
            for p in shown
        )
        figures.append(Figure("cloze", png, alt))
    return Section(
        "cloze",
        title,
        "Held-out paragraphs; the model chooses the last word among four candidates drawn from the "
        "same document. In percent; chance is 25.",
        figures,
        [Table(("pattern", *(NAME[k] for k in KINDS)), rows)],
        notes,
    )
