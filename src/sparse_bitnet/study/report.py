"""``report``: one self-contained HTML page from the rows of a sweep, and its pictures beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sparse_bitnet.console import say
from sparse_bitnet.core import DataError, MissingExtraError
from sparse_bitnet.files import atomic_file, write_text
from sparse_bitnet.study.rows import Row, read_rows

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
RATIO = "perplexity / that of the dense baseline"
LAST = 0.05  # part of training that the cost at the end is averaged over


def report(directory: str | Path, out: str | Path | None = None) -> Path:
    """Build report.html and plots/*.png from a sweep's rows.

    Args:
        directory: holds rows.jsonl or rows.jsonl.xz.
        out: receives the page; the directory itself by default.

    Returns:
        The page, which also names the lines that could not be read.

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
            f"{rows[0].problem or 'no reason is given'}"
        )
    out = Path(out) if out is not None else directory
    sections = build(rows, problems)
    figures = [figure for section in sections for figure in section.figures]
    for figure in figures:
        with atomic_file(out / "plots" / f"{figure.name}.png") as temporary:
            temporary.write_bytes(figure.png)
    write_text(out / PAGE, render("Ternary weights under N:M sparsity", _lead(rows), sections))
    say(f"{len(rows)} rows, {len(figures)} plots: {out / PAGE}")
    return out / PAGE


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
    plain = runs[(runs.method == "published") & (runs.schedule == "scratch")]
    sparse = plain[plain.pattern != "dense"].dropna(subset="ratio")
    sections = [_quality(runs, [*_ratios(sparse), *_lengths(sparse)])]
    for _, of_size in plain.groupby("size", sort=False):
        # The group with most runs.
        main = of_size.loc[of_size.groupby(GROUP).key.transform("size").idxmax(), GROUP]
        sections.append(_training(of_size[(of_size[GROUP] == main).all(axis=1)], by_key))
    return [*sections, _all_runs(rows, runs, problems)]


def _label(group: Sequence[Any]) -> str:
    """Values of :data:`GROUP` as people say them; what is the usual is left out."""
    size, length, method, schedule, setting = group
    special = [part for part in (method, schedule, setting) if part not in PLAIN]
    return ", ".join([size, f"{length:g} tokens per weight", *special])


def _slug(text: str) -> str:
    """A label as part of a file name."""
    short = text.replace(" tokens per weight", "")
    return "-".join("".join(c if c.isalnum() or c == "." else " " for c in short).split())


def _quality(runs: pd.DataFrame, figures: list[Figure]) -> Section:
    """Perplexity, its ratio to the dense baseline, cloze: a line a group and pattern."""
    lines: dict[bool, list[dict[str, str]]] = {True: [], False: []}
    for (*group, pattern), one in runs.groupby([*GROUP, "pattern"], sort=False):
        plain = tuple(group[2:4]) == PLAIN[:2]
        line = {"runs": _label(group), "pattern": pattern}
        for kind in _kinds(runs):
            here, name = one[one.kind == kind], NAME[kind]
            line[f"{name} perplexity"] = mean_text(here.perplexity, 2)
            if plain:
                line[f"{name} / dense"] = mean_text(here.ratio[here.pattern != "dense"])
            else:
                line[f"{name} − published"] = mean_text(here["over published"], 2, "+")
            if runs.cloze.notna().any():
                line[f"{name} cloze, %"] = mean_text(100 * here.cloze, 1)
        lines[plain].append(line)
    text = (
        "Figures are means over seeds ± their standard deviation. '/ dense' is the ratio to the "
        "same model without a mask, by seed; '− published' the difference to the published method, "
        "sparse from scratch, at the same pattern and seed."
    )
    tables = [pd.DataFrame(table) for table in lines.values() if table]
    return Section("Perplexity", [text], tables, figures)


def _ratios(sparse: pd.DataFrame) -> Iterator[Figure]:
    """Ratio to the dense baseline against the pattern, of each group with several."""
    for group, one in sparse.groupby(GROUP, sort=False):
        places = {pattern: place for place, pattern in enumerate(one.pattern.unique())}
        if len(places) > 1:
            label = _label(group)
            png = plots.lines(
                _curves_by_kind(one.assign(x=one.pattern.map(places))),
                f"Cost of the mask, {label}",
                "pattern",
                RATIO,
                ticks={place: pattern for pattern, place in places.items()},
            )
            caption = f"Perplexity over that of the dense baseline by pattern, {label}."
            yield Figure(f"ratio-{_slug(label)}", png, caption)


def _lengths(sparse: pd.DataFrame) -> Iterator[Figure]:
    """Ratio to the dense baseline against training length, where several were trained."""
    for group, one in sparse.groupby(["size", "pattern", "setting"], sort=False):
        lengths = sorted(one["tokens per weight"].unique())
        if len(lengths) > 1:
            label = ", ".join(filter(None, group))
            png = plots.lines(
                _curves_by_kind(one.assign(x=one["tokens per weight"])),
                f"Cost of the mask against training length, {label}",
                "training tokens per weight",
                RATIO,
                log_x=True,
                ticks={x: f"{x:g}" for x in lengths},
            )
            yield Figure(f"length-{_slug(label)}", png, f"Each point is its own run, {label}.")


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
                _curve(row.cell.pattern, factor * values, smooth)
                for row in rows
                for values in [_series(row, name)]
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
            Histogram(f"{NAME[kind]} {row.cell.pattern}, {one['position']}", one, kind)
            for one in row.polarization
            if one["fraction"] == max(snapshot["fraction"] for snapshot in row.polarization)
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
    return Section(f"Training, {label}", [text], [table] if len(table) else [], figures)


def _mask_costs(
    runs: pd.DataFrame, by_key: dict[str, Row]
) -> tuple[dict[str, list[Curve]], pd.DataFrame]:
    """Loss minus that of the dense baseline of the same seed, and its end beside held-out text."""
    dense = {(r.kind, r.seed): by_key[r.key] for r in runs[runs.pattern == "dense"].itertuples()}
    panels: dict[str, list[Curve]] = {}
    ends = []
    for run in runs[runs.pattern != "dense"].dropna(subset="ratio").itertuples():
        here, baseline = by_key[run.key], dense[run.kind, run.seed]
        gaps = (_series(here, "loss") - _series(baseline, "loss")).dropna()
        if len(gaps) < 2:
            continue
        drawn = panels.setdefault(run.pattern, [])
        label = "" if any(curve.kind == run.kind for curve in drawn) else NAME[run.kind]
        drawn.append(_curve(label, gaps, SMOOTH, run.kind))
        last = gaps.tail(max(1, round(LAST * len(gaps)))).mean()
        held_out = math.log(run.ratio) if run.ratio > 0 else math.nan
        ends.append((run.pattern, NAME[run.kind], last, held_out))
    table = pd.DataFrame(ends, columns=["pattern", "kind", "training", "held-out"])
    texts = table.groupby(["pattern", "kind"], sort=False).agg(lambda one: mean_text(one, 3, "+"))
    return panels, texts.reset_index()


def _series(row: Row, name: str) -> pd.Series:
    """A history by tokens."""
    tokens, values = row.series(name)
    return pd.Series(dict(zip(tokens, values, strict=True)), dtype=float)


def _curve(label: str, values: pd.Series, smooth: int, kind: str = "") -> Curve:
    values = values.rolling(smooth, min_periods=1).mean()
    return Curve(label, list(values.index / 1e6), values.tolist(), kind=kind)


def _all_runs(rows: Sequence[Row], runs: pd.DataFrame, problems: Sequence[str]) -> Section:
    """A line a row, in the order of the file."""
    settings = dict(zip(runs.key, runs.setting, strict=True))
    lines = [
        {
            "cell": str(row.cell),
            "setting": settings.get(row.key, ""),
            "perplexity": "diverged" if row.diverged else f"{row.perplexity:.3f}",
            "cloze": _number(row.accuracy, ".1%"),
            "zeros": _number(row.zeros, ".1%"),
            "tokens, millions": _number(row.tokens and row.tokens / 1e6, ",.4g"),
            "seconds": _number(row.seconds, ",.0f"),
            "tokens/s": _number(row.tokens_per_second, ",.0f"),
            "key": row.key,
        }
        for row in rows
    ]
    diverged = [f"{row.cell} diverged: {row.problem}" for row in rows if row.diverged]
    text = "Each line is a row of the file, which has configuration, versions and histories too."
    return Section("All runs", [text, *diverged, *problems], [pd.DataFrame(lines)])


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def _lead(rows: Sequence[Row]) -> list[str]:
    tokens, seconds = (sum(getattr(r, name) or 0 for r in rows) for name in ("tokens", "seconds"))
    known = (r.environment for r in rows if r.environment)
    devices = {f"{one.get('device')}, torch {one.get('torch')}" for one in known}
    return [
        f"{len(rows)} runs, {tokens / 1e6:,.4g}M training tokens, {seconds / 3600:.2f} hours of "
        "training one after the other.",
        "; ".join(sorted(devices)),
    ]
