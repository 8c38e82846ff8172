"""Sections of a report about what could be done otherwise: groups, method, schedule, rate."""

from __future__ import annotations

from sparse_bitnet.core import Pattern
from sparse_bitnet.study import plots, published
from sparse_bitnet.study.analysis import Estimate, Runs, signed, text_of
from sparse_bitnet.study.cells import KINDS, METHODS
from sparse_bitnet.study.page import Figure, Section, Table, needs
from sparse_bitnet.study.plots import NAME

# Patterns of one density and different group sizes, the smaller group first.
SAME_DENSITY = (("2:4", "4:8"), ("3:4", "6:8"))


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
                texts = [text_of(one, 3) for one in ratios]
                rows.append((NAME[kind], f"{small} | {large}", *texts, text_of(gap, 2, True)))
    header = ("kind", "patterns", "smaller group", "larger group", "ΔPPL, smaller − larger")
    notes = needs("2:4, 4:8, 3:4 and 6:8 of both kinds", cells)
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
    notes = needs("bitnet with each ablation", [m for m in methods if m not in have])
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
            digits=1,
        )
        alt = "Bars of perplexity minus that of the published method: " + "; ".join(
            f"{p}, {name}: {signed(gaps[name].mean)}"
            for p, gaps in values.items()
            for name in shown
        )
        figures.append(Figure("ablations", png, alt))
    base = published.ABLATIONS_PPL["published"]
    rows = [
        (
            name,
            *(text_of(values[p].get(name), 2, True) for p in values),
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


def dense_to_sparse(runs: Runs) -> Section:
    """Schedules: dense first, staircases."""
    cells = sorted(
        {(r.cell.pattern, r.cell.until) for r in runs.rows if r.cell.until},
        key=lambda one: (-Pattern.parse(one[0]).density, len(one[1]), one[1]),
    )
    rows, labels, gaps, spreads = [], [], [], []
    for pattern, until in cells:
        gap = runs.excess(
            {"kind": "bitnet", "pattern": pattern}, kind="bitnet", pattern=pattern, until=until
        )
        here = runs.perplexity(kind="bitnet", pattern=pattern, until=until)
        scratch = runs.perplexity(kind="bitnet", pattern=pattern)
        if gap is None or here is None or scratch is None:
            continue
        schedule = ", ".join(f"{p} to {fraction:.0%}" for fraction, p in until)
        labels.append(f"{pattern}\n{schedule.replace(', ', chr(10))}")
        gaps.append(gap)
        spreads.append(scratch.spread)
        rows.append((pattern, schedule, text_of(here), text_of(scratch), text_of(gap, 2, True)))
    if not rows:
        return Section(
            "dense-to-sparse",
            "Dense first, then sparse",
            notes=needs("bitnet with a schedule, and sparse from scratch", ["all"]),
        )
    png = plots.bars(
        labels,
        {"bitnet": [gap.mean for gap in gaps]},
        {"bitnet": [gap.spread for gap in gaps]},
        f"Perplexity above sparse from scratch, {runs.label}",
        "ΔPPL",
        digits=2,
        band=spreads if all(spreads) else (),
    )
    alt = "Bars of perplexity minus that of training sparse from scratch: " + "; ".join(
        f"{pattern}, {schedule}: {gap}" for pattern, schedule, _, _, gap in rows
    )
    band = "Grey: ± the standard deviation of the seeds trained sparse from scratch."
    switched = published.DENSE_TO_SPARSE_PPL["switched"]
    assert isinstance(switched, tuple)
    told = ", ".join(str(perplexity) for perplexity in switched)
    scratch_told = published.DENSE_TO_SPARSE_PPL["sparse from scratch"]
    return Section(
        "dense-to-sparse",
        "Dense first, then sparse",
        "The same pattern at the end, after a dense beginning or down a staircase of patterns. "
        f"Published at 6:8: perplexity {told} after a switch, {scratch_told} from scratch.",
        [Figure("dense-to-sparse", png, alt, band if all(spreads) else "")],
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


def _published_ablation(name: str, base: float | None) -> str:
    if name not in published.ABLATIONS_PPL:
        return "–"
    value = published.ABLATIONS_PPL[name]
    return "worse" if value is None or base is None else signed(value - base)
