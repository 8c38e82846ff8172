"""``report``: one self-contained HTML page from the rows of a sweep, and its pictures beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_bitnet.console import say
from sparse_bitnet.core import DataError, MissingExtraError
from sparse_bitnet.files import atomic_file, write_text
from sparse_bitnet.study.rows import Row, is_number, read_rows

try:
    import pandas as pd

    from sparse_bitnet.study import plots
    from sparse_bitnet.study.frame import GROUP, frame, mean_text
    from sparse_bitnet.study.page import Figure, Section, render
    from sparse_bitnet.study.plots import NAME, Curve, Histogram
except ImportError as error:
    raise MissingExtraError("reports need pandas: pip install 'sparse-bitnet[plot]'") from error

PAGE = "report.html"
PLAIN = ("published", "scratch", "")  # method, schedule, setting
DRAWN = 4  # patterns that have curves over training
SMOOTH = 5  # logged steps that a point of a loss curve averages
LOSS_SHOWN = 1.6  # times the lowest final loss: how far up the loss curves are drawn
LAST = 0.05  # part of training that the cost at the end is averaged over


@dataclass(frozen=True)
class Written:
    """What :func:`report` wrote: the page, its pictures, and what it had to leave out."""

    page: Path
    pictures: list[Path]
    problems: list[str]


def report(directory: str | Path, out: str | Path | None = None) -> Written:
    """Build report.html and plots/*.png from a sweep's rows.

    Args:
        directory: holds rows.jsonl or rows.jsonl.xz.
        out: receives the page; the directory itself by default.

    Raises:
        DataError: if there is no such file, or not one usable row in it.
        MissingExtraError: without matplotlib and pandas.
    """
    directory = Path(directory)
    rows, problems = read_rows(directory)
    for problem in problems:
        say(problem)
    if not rows:
        raise DataError(f"{directory}: no finished cell in its rows yet; run the sweep further")
    if all(row.diverged for row in rows):
        raise DataError(
            f"{directory}: none of its {len(rows)} runs gave a perplexity; {rows[0].cell}: "
            f"{rows[0].raw.get('problem') or 'no reason is given'}"
        )
    out = Path(out) if out is not None else directory
    sections = build(rows, problems)
    plots_directory = out / "plots"
    plots_directory.mkdir(parents=True, exist_ok=True)
    pictures = []
    for figure in (figure for section in sections for figure in section.figures):
        pictures.append(plots_directory / f"{figure.name}.png")
        with atomic_file(pictures[-1]) as temporary:
            temporary.write_bytes(figure.png)
    write_text(out / PAGE, render("Ternary weights under N:M sparsity", _lead(rows), sections))
    say(f"{len(rows)} rows, {len(pictures)} plots: {out / PAGE}")
    return Written(out / PAGE, pictures, problems)


def build(rows: Sequence[Row], problems: Sequence[str] = ()) -> list[Section]:
    """All sections of the page, from at least one row that gave a perplexity."""
    runs = frame(rows)
    # Sizes with most runs first, then the longest training, then the densest pattern.
    counts = runs["size"].map(runs["size"].value_counts())
    runs = runs.assign(count=counts).sort_values(
        ["count", "size", "setting", "tokens per weight", "method", "schedule", "density", "seed"],
        ascending=[False, True, True, False, True, True, False, True],
    )
    by_key = {row.key: row for row in rows}
    sections = [_quality(runs), _lengths(runs)]
    plain = runs[(runs.method == "published") & (runs.schedule == "scratch")]
    for _, of_size in plain.groupby("size", sort=False):
        # The group with most runs; of equally many, the longest training.
        counts = of_size.groupby(GROUP).size()
        main = max(counts.index, key=lambda group: (counts[group], group[1]))
        chosen = of_size[(of_size[GROUP] == list(main)).all(axis=1)]
        sections.append(_training(chosen, by_key))
    sections.append(_all_runs(rows, runs, problems))
    return [section for section in sections if section.tables or section.figures]


def _label(group: Sequence[Any]) -> str:
    """Values of :data:`GROUP` as people say them; what is the usual is left out."""
    size, length, method, schedule, setting = group
    special = [part for part in (method, schedule, setting) if part not in PLAIN]
    return ", ".join([size, f"{length:g} tokens per weight", *special])


def _slug(text: str) -> str:
    """A label as part of a file name."""
    short = text.replace(" tokens per weight", "")
    return "-".join("".join(c if c.isalnum() or c == "." else " " for c in short).split())


def _quality(runs: pd.DataFrame) -> Section:
    """Perplexity, its ratio to the dense baseline, cloze: a line a group and pattern."""
    lines: dict[bool, list[dict[str, str]]] = {True: [], False: []}
    figures = []
    for group, of_group in runs.groupby(GROUP, sort=False):
        label, plain = _label(group), tuple(group[2:4]) == PLAIN[:2]
        for pattern, one in of_group.groupby("pattern", sort=False):
            line = {"runs": label, "pattern": pattern}
            for kind in _kinds(runs):
                here = one[one.kind == kind]
                name = NAME[kind]
                line[f"{name} perplexity"] = mean_text(here.perplexity, 2)
                if plain:
                    ratios = here.ratio[here.pattern != "dense"]
                    line[f"{name} / dense"] = mean_text(ratios)
                else:
                    line[f"{name} − published"] = mean_text(here["over published"], 2, "+")
                if runs.cloze.notna().any():
                    line[f"{name} cloze, %"] = mean_text(100 * here.cloze, 1)
            lines[plain].append(line)
        sparse = of_group[of_group.pattern != "dense"].dropna(subset="ratio")
        places = {pattern: place for place, pattern in enumerate(sparse.pattern.unique())}
        if len(places) > 1 and plain:
            png = plots.lines(
                _curves_by_kind(sparse.assign(x=sparse.pattern.map(places))),
                f"Cost of the mask, {label}",
                "pattern",
                "perplexity / that of the dense baseline",
                ticks={place: pattern for pattern, place in places.items()},
            )
            caption = f"Perplexity over that of the dense baseline by pattern, {label}."
            figures.append(Figure(f"ratio-{_slug(label)}", png, caption))
    text = (
        "Figures are means over seeds ± their standard deviation. '/ dense' is the ratio to the "
        "same model without a mask, by seed; '− published' the difference to the published method, "
        "sparse from scratch, at the same pattern and seed."
    )
    return Section(
        "Perplexity", text, [pd.DataFrame(table) for table in lines.values() if table], figures
    )


def _lengths(runs: pd.DataFrame) -> Section:
    """Ratio to the dense baseline against training length, where several were trained."""
    figures = []
    plain = runs[(runs.method == "published") & (runs.schedule == "scratch")].dropna(subset="ratio")
    sparse = plain[plain.pattern != "dense"]
    for (size, setting, pattern), one in sparse.groupby(["size", "setting", "pattern"], sort=False):
        lengths = sorted(one["tokens per weight"].unique())
        if len(lengths) < 2:
            continue
        label = ", ".join(part for part in (size, pattern, setting) if part)
        png = plots.lines(
            _curves_by_kind(one.assign(x=one["tokens per weight"])),
            f"Cost of the mask against training length, {label}",
            "training tokens per weight",
            "perplexity / that of the dense baseline",
            log_x=True,
            ticks={x: f"{x:g}" for x in lengths},
        )
        figures.append(
            Figure(f"length-{_slug(label)}", png, f"Each point is its own run, {label}.")
        )
    return Section("Training length", figures=figures)


def _curves_by_kind(runs: pd.DataFrame) -> list[Curve]:
    """``ratio`` against ``x``: mean, spread and single seeds of each kind."""
    curves = []
    for kind in _kinds(runs):
        points = runs[runs.kind == kind].groupby("x").ratio
        curves.append(
            Curve(
                NAME[kind],
                list(points.groups),
                list(points.mean()),
                list(points.std().fillna(0.0)),
                kind,
                seeds=[list(values) for _, values in points],
            )
        )
    return curves


def _kinds(runs: pd.DataFrame) -> list[str]:
    return [kind for kind in NAME if (runs.kind == kind).any()]


def _training(runs: pd.DataFrame, by_key: dict[str, Row]) -> Section:
    """Curves over training and histograms of the weights, of one group's lowest seeds."""
    label = _label(runs.iloc[0][GROUP])
    slug = _slug(label)
    # Dense, and the sparse patterns of most runs.
    counts = runs[runs.pattern != "dense"].pattern.value_counts(sort=True)
    patterns = ["dense", *counts.index[: DRAWN - 1]]
    ordered = runs[runs.pattern.isin(patterns)]
    first = ordered.drop_duplicates(["kind", "pattern"])
    shown = {kind: [by_key[k] for k in first[first.kind == kind].key] for kind in _kinds(runs)}
    figures = []

    def panels(name: str, title: str, ylabel: str, drawn: dict[str, list[Curve]], **m: Any) -> None:
        drawn = {panel: curves for panel, curves in drawn.items() if curves}
        if drawn:
            png = plots.panels(drawn, f"{title}, {label}", "training tokens, millions", ylabel, **m)
            ends = "; ".join(
                f"{panel}: " + ", ".join(f"{c.label} {c.y[-1]:.4g}".strip() for c in curves)
                for panel, curves in drawn.items()
            )
            figures.append(Figure(f"{name}-{slug}", png, f"{title}, {label}. At the end: {ends}."))

    def curves(name: str, factor: float = 1.0, smooth: int = 1) -> dict[str, list[Curve]]:
        return {
            NAME[kind]: [
                Curve(row.cell.pattern, _millions(tokens), _smoothed(values, smooth, factor))
                for row in rows
                for tokens, values in [row.series(name)]
                if len(values) > 1
            ]
            for kind, rows in shown.items()
        }

    losses = curves("loss", smooth=SMOOTH)
    ends = [curve.y[-1] for of_kind in losses.values() for curve in of_kind]
    top = LOSS_SHOWN * min(ends) if ends else None
    panels("loss", "Training loss", "nats per token", losses, log_x=True, top=top)
    costs, table = _mask_costs(ordered, by_key)
    title = "Training loss minus the dense baseline's on the same batches"
    panels("mask-cost", title, "nats per token", costs, log_x=True)
    panels("flips", "Mask entries flipped by one step", "%", curves("flip_rate", 100.0))
    panels("zeros", "Zeros before the mask", "% of weights", curves("zeros", 100.0))
    histograms = [
        [
            Histogram(
                f"{NAME[kind]} {row.cell.pattern}, {one['position']}",
                one["edges"],
                one["magnitudes"],
                one.get("thresholds") or [],
                kind,
            )
            for one in row.snapshots
            if one["fraction"] == max(snapshot["fraction"] for snapshot in row.snapshots)
        ]
        for kind, rows in shown.items()
        for row in rows[-1:]
    ]
    if any(histograms):
        png = plots.polarization([row for row in histograms if row], f"|w|/γ at the end, {label}")
        caption = (
            "Filled: distribution of |w|/γ. Line: the groups' pruning thresholds, scaled to the "
            "same height. Yellow: the dead zone, where a ternary weight is zero without a mask."
        )
        figures.append(Figure(f"polarization-{slug}", png, caption))
    text = (
        "Curves are of the lowest seed. The table has the cost of the mask, nats per token: over "
        f"the last {LAST:.0%} of training, and on held-out text."
    )
    return Section(f"Training, {label}", text, [table] if len(table) else [], figures)


def _mask_costs(
    runs: pd.DataFrame, by_key: dict[str, Row]
) -> tuple[dict[str, list[Curve]], pd.DataFrame]:
    """Loss minus that of the dense baseline of the same seed, and its end beside held-out text."""
    dense = {
        (run.kind, run.seed): by_key[run.key] for run in runs[runs.pattern == "dense"].itertuples()
    }
    panels: dict[str, list[Curve]] = {}
    ends = []
    for run in runs[runs.pattern != "dense"].dropna(subset="ratio").itertuples():
        row, baseline = by_key[run.key], dense[run.kind, run.seed]
        before = dict(zip(*baseline.series("loss"), strict=True))
        both = [(t, v - before[t]) for t, v in zip(*row.series("loss"), strict=True) if t in before]
        if len(both) < 2:
            continue
        tokens, gaps = [t for t, _ in both], pd.Series([gap for _, gap in both])
        drawn = panels.setdefault(run.pattern, [])
        label = "" if any(curve.kind == run.kind for curve in drawn) else NAME[run.kind]
        drawn.append(Curve(label, _millions(tokens), _smoothed(gaps, SMOOTH), kind=run.kind))
        last = gaps.tail(max(1, round(LAST * len(gaps)))).mean()
        ratio = row.perplexity / baseline.perplexity
        held_out = math.log(ratio) if ratio > 0 else math.nan
        ends.append((run.pattern, NAME[run.kind], last, held_out))
    table = pd.DataFrame(ends, columns=["pattern", "kind", "training", "held-out"])
    lines = [
        {
            "pattern": p,
            "kind": k,
            **{n: mean_text(one[n], 3, "+") for n in ("training", "held-out")},
        }
        for (p, k), one in table.groupby(["pattern", "kind"], sort=False)
    ]
    return panels, pd.DataFrame(lines)


def _millions(tokens: Sequence[float]) -> list[float]:
    return [t / 1e6 for t in tokens]


def _smoothed(values: Any, window: int, factor: float = 1.0) -> list[float]:
    smooth: list[float] = (
        (factor * pd.Series(values)).rolling(window, min_periods=1).mean().tolist()
    )
    return smooth


def _all_runs(rows: Sequence[Row], runs: pd.DataFrame, problems: Sequence[str]) -> Section:
    """A line a row, in the order of the file."""
    settings = dict(zip(runs.key, runs.setting, strict=True))
    lines = [
        {
            "cell": str(row.cell),
            "setting": settings.get(row.key, ""),
            "perplexity": "diverged" if row.diverged else f"{row.perplexity:.3f}",
            "cloze": "–" if row.accuracy is None else f"{row.accuracy:.1%}",
            "zeros": "–" if row.zeros is None else f"{row.zeros:.1%}",
            "tokens": _number(row.raw.get("tokens"), 1e6, "M"),
            "seconds": _number(row.raw.get("seconds")),
            "tokens/s": _number(row.raw.get("tokens_per_second"), 1e6, "M", 2),
            "key": row.key,
        }
        for row in rows
    ]
    diverged = [f"{r.cell} diverged: {r.raw.get('problem')}" for r in rows if r.diverged]
    text = "Each line is a row of the file, which has configuration, versions and histories too."
    return Section("All runs", text, [pd.DataFrame(lines)], notes=[*diverged, *problems])


def _number(value: object, unit: float = 1.0, name: str = "", digits: int = 0) -> str:
    return f"{value / unit:,.{digits}f}{name}" if isinstance(value, int | float) else "–"


def _lead(rows: Sequence[Row]) -> list[str]:
    tokens, seconds = (
        sum(n for r in rows if (n := r.raw.get(name)) is not None and is_number(n))
        for name in ("tokens", "seconds")
    )
    environments = [e for r in rows if isinstance(e := r.raw.get("environment"), dict)]
    devices = sorted({str(e.get("device")) for e in environments})
    versions = sorted({f"torch {e.get('torch')}" for e in environments})
    commits = sorted({str(e["commit"])[:10] for e in environments if e.get("commit")})
    return [
        f"{len(rows)} runs, {tokens / 1e6:,.4g}M training tokens, {seconds / 3600:.2f} hours of "
        "training one after the other.",
        ", ".join([*devices, *versions, *(f"commit {c}" for c in commits)]),
    ]
