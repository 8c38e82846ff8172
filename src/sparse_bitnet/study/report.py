"""``report``: one self-contained HTML page from the rows of a sweep, and its pictures beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparse_bitnet.console import progress, say
from sparse_bitnet.core import DataError
from sparse_bitnet.files import atomic_file, write_text
from sparse_bitnet.study import published
from sparse_bitnet.study.analysis import Runs, sizes
from sparse_bitnet.study.claims import RULE, claims
from sparse_bitnet.study.page import Section, Table, render
from sparse_bitnet.study.rows import Row, read_rows
from sparse_bitnet.study.sections_quality import cloze, collapse, delta_by_size, tokens_per_weight
from sparse_bitnet.study.sections_training import flips, losses, polarization, zeros
from sparse_bitnet.study.sections_variants import (
    ablations,
    dense_to_sparse,
    group_size,
    learning_rate,
)

PAGE = "report.html"
# Sections about one size, in the page's order; those of quality first.
ABOUT_A_SIZE: tuple[Callable[[Runs], Section], ...] = (
    collapse,
    tokens_per_weight,
    group_size,
    ablations,
    dense_to_sparse,
    cloze,
    learning_rate,
    losses,
    flips,
    zeros,
    polarization,
)


@dataclass(frozen=True)
class Written:
    """What :func:`report` wrote: the page, its pictures, and what it had to leave out."""

    page: Path
    pictures: list[Path]
    problems: list[str]


def report(directory: str | Path, out: str | Path | None = None) -> Written:
    """Build ``report.html`` and ``plots/*.png`` from a sweep's ``rows.jsonl``.

    Args:
        directory: holds ``rows.jsonl``.
        out: receives the page; ``directory`` itself by default.

    Raises:
        DataError: if there is no such file, or not one usable row in it.
        MissingExtraError: without matplotlib.
    """
    directory = Path(directory)
    rows, problems = read_rows(directory)
    for problem in problems:
        say(problem)
    if not any(not row.diverged for row in rows):
        raise DataError(f"{directory}: no finished cell in its rows yet; run the sweep further")
    out = Path(out) if out is not None else directory
    sections = build(rows, problems)
    plots = out / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    pictures = []
    for figure in (figure for section in sections for figure in section.figures):
        with atomic_file(plots / f"{figure.name}.png") as temporary:
            temporary.write_bytes(figure.png)
        pictures.append(plots / f"{figure.name}.png")
    write_text(out / PAGE, render("Ternary weights under N:M sparsity", _lead(rows), sections))
    say(f"{len(rows)} rows, {len(pictures)} plots: {out / PAGE}")
    return Written(out / PAGE, pictures, problems)


def build(rows: Sequence[Row], problems: Sequence[str] = ()) -> list[Section]:
    """All sections of the page. One without data has a note that names the missing cells."""
    by_size = [Runs(rows, size) for size in sizes(rows)]
    by_size = [runs for runs in by_size if runs.rows]
    main, others = by_size[0], by_size[1:]
    sections = [_claims(main, others), delta_by_size(by_size)]
    steps = [(runs, make) for runs in by_size for make in ABOUT_A_SIZE]
    with progress("plots", len(steps)) as task:
        for runs, make in steps:
            section = make(runs)
            # Other sizes appear where they have something to show.
            if runs is main or section.figures or section.tables:
                sections.append(section if runs is main else _of_size(section, runs))
            task.advance()
    sections.append(_runs(rows, problems))
    return sections


def _of_size(section: Section, runs: Runs) -> Section:
    figures = [
        dataclasses.replace(figure, name=f"{figure.name}-{runs.size}") for figure in section.figures
    ]
    return dataclasses.replace(
        section,
        id=f"{section.id}-{runs.size}",
        title=f"{section.title}, {runs.label}",
        figures=figures,
    )


def _claims(main: Runs, others: list[Runs]) -> Section:
    found = claims(main, others)
    table = Table(
        ("claim", f"published ({published.SOURCE})", f"here, {main.label}", "verdict"),
        [(c.claim, c.published, c.ours, c.verdict) for c in found],
    )
    missing = [f"Not decided: {c.claim}. Missing: {c.missing}." for c in found if c.missing]
    return Section(
        "claims",
        "Published claims and what we find",
        f"Judged on {main.label} at {main.main_length:g} training tokens per weight.",
        tables=[table],
        notes=[RULE, *missing],
    )


def _runs(rows: Sequence[Row], problems: Sequence[str]) -> Section:
    table = Table(
        ("cell", "perplexity", "cloze", "zeros", "tokens", "seconds", "tokens/s", "key"),
        [
            (
                str(row.cell),
                "diverged" if row.diverged else f"{row.perplexity:.3f}",
                "–" if row.accuracy is None else f"{row.accuracy:.1%}",
                "–" if row.zeros is None else f"{row.zeros:.1%}",
                _number(row.raw.get("tokens"), 1e6, "M"),
                _number(row.raw.get("seconds")),
                _number(row.raw.get("tokens_per_second"), 1e6, "M", 2),
                row.key,
            )
            for row in rows
        ],
    )
    diverged = [f"{r.cell} diverged: {r.raw.get('problem')}" for r in rows if r.diverged]
    return Section(
        "runs",
        "All runs",
        "Each line is a row of rows.jsonl, which holds the whole configuration, versions, device "
        "and histories.",
        tables=[table],
        notes=[*diverged, *problems],
    )


def _number(value: object, unit: float = 1.0, name: str = "", digits: int = 0) -> str:
    return f"{value / unit:,.{digits}f}{name}" if isinstance(value, int | float) else "–"


def _lead(rows: Sequence[Row]) -> list[str]:
    tokens = sum(t for r in rows if isinstance(t := r.raw.get("tokens"), int | float))
    seconds = sum(s for r in rows if isinstance(s := r.raw.get("seconds"), int | float))
    environments = [e for r in rows if isinstance(e := r.raw.get("environment"), dict)]
    devices = sorted({str(e.get("device")) for e in environments})
    versions = sorted({f"torch {e.get('torch')}" for e in environments})
    commits = sorted({str(e["commit"])[:10] for e in environments if e.get("commit")})
    return [
        f"{len(rows)} runs, {tokens / 1e9:.2f}G training tokens, {seconds / 3600:.1f} hours of "
        "training one after the other.",
        ", ".join([*devices, *versions, *(f"commit {c}" for c in commits)]),
    ]
