"""Sections of a report about how good the models are."""

from __future__ import annotations

from collections.abc import Sequence

from sparse_bitnet.core import Pattern
from sparse_bitnet.study import plots, published
from sparse_bitnet.study.analysis import Estimate, Runs, crossing
from sparse_bitnet.study.cells import METHODS
from sparse_bitnet.study.page import Figure, Section, Table
from sparse_bitnet.study.plots import NAME, Curve

KINDS = ("bf16", "bitnet")
EIGHTS = tuple(published.NORMALISED_PPL["bf16"])
LENGTH_PATTERN = "4:8"
# Patterns of one density and different group sizes, the smaller group first.
SAME_DENSITY = (("2:4", "4:8"), ("3:4", "6:8"))


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
                )
            )
        cells += [f"{kind} {p}" for p, (_, e) in zip(EIGHTS, found, strict=True) if e is None]
    notes = _missing("bf16 and bitnet at dense and each N:8", cells)
    if not curves:
        return Section("collapse", "Where sparsity breaks the model", notes=notes)
    for kind, values in published.NORMALISED_PPL.items():
        x = [EIGHTS.index(p) for p in values]
        label = f"{NAME[kind]}, published 0.5B"
        curves.append(Curve(label, x, list(values.values()), None, kind, published=True))
    png = plots.collapse(
        curves, EIGHTS, published.COLLAPSE_AT, f"Normalised perplexity, {runs.label}"
    )
    table = Table(
        (
            "pattern",
            *(f"{NAME[k]}, ours" for k in KINDS),
            *(f"{NAME[k]}, published" for k in KINDS),
        ),
        [
            (
                p,
                *(_text(runs.ratio(k, p), 3) for k in KINDS),
                *(f"{published.NORMALISED_PPL[k][p]:.2f}" for k in KINDS),
            )
            for p in EIGHTS
        ],
    )
    alt = "Line plot of perplexity over that of the dense model against the pattern. " + " ".join(
        f"{curve.label}: "
        + ", ".join(f"{EIGHTS[int(i)]} {y:.3f}" for i, y in zip(curve.x, curve.y, strict=True))
        + "."
        for curve in curves
    )
    caption = (
        "Error bars: standard deviation over seeds. Dotted: the +10 % line that the paper calls "
        "collapse."
    )
    return Section(
        "collapse",
        "Where sparsity breaks the model",
        "Perplexity of each model over that of the same model without a mask, against the pattern.",
        [Figure("collapse", png, alt, caption)],
        [table],
        notes,
    )


def delta_by_size(by_size: Sequence[Runs]) -> Section:
    """ΔPPL at 6:8 by size, beside the published sizes."""
    rows = [
        (
            f"{size} (published)",
            "–",
            "–",
            *(f"{published.DELTA_PPL_6_8[k][size]:+.2f}" for k in KINDS),
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
                    f"{runs.label}, {runs.main_length:g} tokens per weight",
                    *(_text(one) for one in dense),
                    *(_text(one, 2, True) for one in deltas),
                )
            )
    header = ("size", *(f"{NAME[k]} dense" for k in KINDS), *(f"Δ {NAME[k]} 6:8" for k in KINDS))
    notes = [] if ours else _missing("bf16 and bitnet at dense and 6:8", ["all"])
    return Section(
        "delta",
        "ΔPPL at 6:8 by size",
        "Perplexity at 6:8 minus that of the same model without a mask.",
        tables=[Table(header, [*ours, *rows])] if ours else [],
        notes=notes,
    )


def group_size(runs: Runs) -> Section:
    """Does the group size matter at equal density?"""
    rows, cells = [], []
    for kind in KINDS:
        for small, large in SAME_DENSITY:
            ratios = runs.ratio(kind, small), runs.ratio(kind, large)
            cells += [
                f"{kind} {p}" for p, e in zip((small, large), ratios, strict=True) if e is None
            ]
            if all(ratios):
                gap = runs.excess({"kind": kind, "pattern": large}, kind=kind, pattern=small)
                texts = [_text(one, 3) for one in ratios]
                rows.append((NAME[kind], f"{small} | {large}", *texts, _text(gap, 2, True)))
    header = ("kind", "patterns", "smaller group", "larger group", "ΔPPL, smaller − larger")
    notes = _missing("2:4, 4:8, 3:4 and 6:8 of both kinds", cells)
    if not rows:
        return Section("group-size", "Does the group size matter?", notes=notes)
    labels = [f"{kind} {patterns}" for kind, patterns, *_ in rows]
    small_large: dict[str, list[Estimate]] = {"smaller group": [], "larger group": []}
    for kind, patterns, *_ in rows:
        key = next(k for k, v in NAME.items() if v == kind)
        for name, pattern in zip(small_large, patterns.split(" | "), strict=True):
            estimate = runs.ratio(key, pattern)
            assert estimate is not None  # only such rows are in the table
            small_large[name].append(estimate)
    png = plots.bars(
        labels,
        {name: [e.mean for e in values] for name, values in small_large.items()},
        {name: [e.spread for e in values] for name, values in small_large.items()},
        f"Equal density, different group, {runs.label}",
        "perplexity / dense",
        base=1.0,
    )
    alt = "Bars of normalised perplexity at equal density: " + "; ".join(
        f"{kind} {patterns}: {small} and {large}" for kind, patterns, small, large, _ in rows
    )
    return Section(
        "group-size",
        "Does the group size matter?",
        "The same fraction of weights kept, in groups of 4 and of 8. A larger group leaves more "
        "choice which weights to keep.",
        [Figure("group-size", png, alt)],
        [Table(header, rows)],
        notes,
    )


def tokens_per_weight(runs: Runs) -> Section:
    """Normalised perplexity at 4:8 against training length: where do the kinds cross?"""
    title = f"Normalised perplexity at {LENGTH_PATTERN} against training length"
    curves: dict[str, Curve] = {}
    found: dict[str, dict[float, Estimate]] = {}
    for kind in KINDS:
        found[kind] = {}
        for length in runs.lengths(LENGTH_PATTERN):
            ratio = runs.ratio(kind, LENGTH_PATTERN, tokens_per_weight=length)
            if ratio is not None:
                found[kind][length] = ratio
        if len(found[kind]) > 1:
            curves[kind] = Curve(
                NAME[kind],
                list(found[kind]),
                [e.mean for e in found[kind].values()],
                [e.spread for e in found[kind].values()],
                kind,
            )
    missing = [f"{kind} at more lengths" for kind in KINDS if kind not in curves]
    notes = _missing(f"dense and {LENGTH_PATTERN} of both kinds at several lengths", missing)
    if not curves:
        return Section("length", title, notes=notes)
    shared = [x for x in found["bf16"] if x in found["bitnet"]]
    meet = crossing(
        shared,
        [found["bf16"][x].mean for x in shared],
        [found["bitnet"][x].mean for x in shared],
    )
    if len(shared) < 2:
        told = "There are not enough lengths that both kinds share to see a crossing."
    elif meet is None:
        told = "The curves do not cross in this range."
    else:
        told = f"The curves cross at about {meet:.0f} tokens per weight."
    lengths = sorted({x for curve in curves.values() for x in curve.x})
    png = plots.lines(
        list(curves.values()),
        f"Cost of {LENGTH_PATTERN}, {runs.label}",
        "training tokens per weight",
        "perplexity / that of the dense model",
        log_x=True,
        mark=meet,
        ticks={x: f"{x:g}" for x in lengths},
    )
    rows = [(f"{x:g}", *(_text(found[kind].get(x), 3) for kind in KINDS)) for x in lengths]
    alt = f"Line plot of normalised perplexity against tokens per weight. {told} " + " ".join(
        f"{curve.label}: "
        + ", ".join(f"{x:g} {y:.3f}" for x, y in zip(curve.x, curve.y, strict=True))
        + "."
        for curve in curves.values()
    )
    return Section(
        "length",
        title,
        "An undertrained model loses little to a mask; the longer it trains, the more it needs "
        f"its weights. {told} Each point is a run of its own with its own schedule.",
        [Figure("length", png, alt, "Dotted: where the curves cross.")],
        [Table(("tokens per weight", *(NAME[k] for k in KINDS)), rows)],
        notes,
    )


def ablations(runs: Runs) -> Section:
    """Every method at every pattern that has both it and the published one."""
    methods = [name for name in METHODS if name != "published"]
    patterns = sorted(
        {r.cell.pattern for r in runs.rows if r.cell.method != "published"},
        key=lambda p: -Pattern.parse(p).density,
    )
    values: dict[str, dict[str, Estimate]] = {}
    for name in methods:
        for pattern in patterns:
            gap = runs.excess(
                {"kind": "bitnet", "pattern": pattern},
                kind="bitnet",
                pattern=pattern,
                method=name,
            )
            if gap is not None:
                values.setdefault(pattern, {})[name] = gap
    have = {name for gaps in values.values() for name in gaps}
    notes = _missing("bitnet with each ablation", [m for m in methods if m not in have])
    if not values:
        return Section("ablations", "Ablations", notes=notes)
    shown = [name for name in methods if all(name in gaps for gaps in values.values())]
    figures = []
    if shown:
        png = plots.bars(
            [name.replace("-", " ") for name in shown],
            {p: [gaps[name].mean for name in shown] for p, gaps in values.items()},
            {p: [gaps[name].spread for name in shown] for p, gaps in values.items()},
            f"Perplexity above the published method, {runs.label}",
            "ΔPPL",
        )
        alt = "Bars of perplexity minus that of the published method: " + "; ".join(
            f"{p}, {name}: {gaps[name].mean:+.2f}" for p, gaps in values.items() for name in shown
        )
        figures.append(Figure("ablations", png, alt))
    base = published.ABLATIONS_PPL["published"]
    rows = [
        (
            name,
            *(_text(values[p].get(name), 2, True) for p in values),
            _published_ablation(name, base),
        )
        for name in methods
        if name in have
    ]
    header = ("ablation", *(f"ΔPPL at {p}" for p in values), "published, 6:8")
    return Section(
        "ablations",
        "Ablations",
        "Perplexity minus that of the published method, same pattern and seed.",
        figures,
        [Table(header, rows)],
        notes,
    )


def _published_ablation(name: str, base: float | None) -> str:
    if name not in published.ABLATIONS_PPL:
        return "–"
    value = published.ABLATIONS_PPL[name]
    return "worse" if value is None or base is None else f"{value - base:+.2f}"


def dense_to_sparse(runs: Runs) -> Section:
    """Schedules: dense first, staircases."""
    cells = sorted({(r.cell.pattern, r.cell.until) for r in runs.rows if r.cell.until})
    rows, labels, gaps = [], [], []
    for pattern, until in cells:
        gap = runs.excess(
            {"kind": "bitnet", "pattern": pattern}, kind="bitnet", pattern=pattern, until=until
        )
        here = runs.perplexity(kind="bitnet", pattern=pattern, until=until)
        scratch = runs.perplexity(kind="bitnet", pattern=pattern)
        if gap is None or here is None:
            continue
        schedule = ", ".join(f"{p} to {fraction:.0%}" for fraction, p in until)
        labels.append(f"{pattern}\n{schedule.replace(', ', chr(10))}")
        gaps.append(gap)
        rows.append((pattern, schedule, _text(here), _text(scratch), _text(gap, 2, True)))
    if not rows:
        return Section(
            "dense-to-sparse",
            "Dense first, then sparse",
            notes=_missing("bitnet with a schedule, and sparse from scratch", ["all"]),
        )
    png = plots.bars(
        labels,
        {"bitnet": [gap.mean for gap in gaps]},
        {"bitnet": [gap.spread for gap in gaps]},
        f"Perplexity above sparse from scratch, {runs.label}",
        "ΔPPL",
    )
    alt = "Bars of perplexity minus that of training sparse from scratch: " + "; ".join(
        f"{pattern}, {schedule}: {gap}" for pattern, schedule, _, _, gap in rows
    )
    switched = published.DENSE_TO_SPARSE_PPL["switched"]
    scratch_told = published.DENSE_TO_SPARSE_PPL["sparse from scratch"]
    return Section(
        "dense-to-sparse",
        "Dense first, then sparse",
        "The same pattern at the end, after a dense beginning or down a staircase of patterns. "
        f"Published at 6:8: perplexity {switched} after a switch, {scratch_told} from scratch.",
        [Figure("dense-to-sparse", png, alt)],
        [Table(("final pattern", "before", "perplexity", "from scratch", "ΔPPL"), rows)],
    )


def learning_rate(runs: Runs) -> Section:
    """Is either dense model held back by its learning rate?"""
    title = "Learning rate of the dense models"
    found = {kind: runs.rates(kind) for kind in KINDS}
    if all(len(rates) < 2 for rates in found.values()):
        return Section(
            "rate", title, notes=["Needs dense models of both kinds with other learning rates."]
        )
    shown = sorted({rate for rates in found.values() for rate in rates})
    used = {kind: runs.main_rate.get(kind) for kind in KINDS}
    rows = [
        (
            f"{rate:g}",
            *(
                f"{found[k][rate]:.2f}{' (used)' if used[k] == rate else ''}"
                if rate in found[k]
                else "–"
                for k in KINDS
            ),
        )
        for rate in shown
    ]
    return Section(
        "rate",
        title,
        "Perplexity without a mask at several peak learning rates, one seed. A comparison is fair "
        "only if neither kind is held back by its rate.",
        tables=[Table(("learning rate", *(NAME[k] for k in KINDS)), rows)],
    )


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
            rows.append((pattern, *(_text(found[k].get(pattern), 1) for k in KINDS)))
    title = "Downstream stand-in: the last word of a paragraph"
    notes = _missing("cloze accuracy", cells)
    shown = [p for p in patterns if all(p in found[kind] for kind in KINDS)]
    if not rows:
        return Section("cloze", title, notes=notes)
    figures = []
    if shown:
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


def _text(estimate: Estimate | None, digits: int = 2, sign: bool = False) -> str:
    return "–" if estimate is None else estimate.text(digits, sign)


def _missing(needs: str, cells: Sequence[str]) -> list[str]:
    if not cells:
        return []
    named = "" if list(cells) == ["all"] else f" Missing: {', '.join(cells)}."
    return [f"Needs {needs}.{named}"]
