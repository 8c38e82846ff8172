"""``report``: one self-contained HTML page from the rows of a sweep, and its pictures beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparse_bitnet.console import progress, say
from sparse_bitnet.core import DataError, Pattern
from sparse_bitnet.files import atomic_file, write_text
from sparse_bitnet.study import published
from sparse_bitnet.study.analysis import Runs
from sparse_bitnet.study.claims import RULE, claim_about_size, claims
from sparse_bitnet.study.experiments import experiments
from sparse_bitnet.study.page import Section, Table, render
from sparse_bitnet.study.rows import Row, is_number, read_rows
from sparse_bitnet.study.sections_quality import cloze, collapse, delta_by_size, tokens_per_weight
from sparse_bitnet.study.sections_training import (
    flips,
    losses,
    mask_cost,
    polarization,
    zeros,
)
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
    mask_cost,
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
# What a second setting of a size is shown for.
ABOUT_A_SETTING = (collapse, tokens_per_weight, mask_cost, losses)


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
    if not rows:
        raise DataError(f"{directory}: no finished cell in its rows yet; run the sweep further")
    if all(row.diverged for row in rows):
        raise DataError(
            f"{directory}: none of its {len(rows)} runs gave a perplexity; {rows[0].cell}: "
            f"{rows[0].raw.get('problem') or 'no reason is given'}"
        )
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
    say(f"{_count(rows, 'row')}, {_count(pictures, 'plot')}: {out / PAGE}")
    return Written(out / PAGE, pictures, problems)


def build(rows: Sequence[Row], problems: Sequence[str] = ()) -> list[Section]:
    """All sections of the page. One without data has a note that names the missing cells."""
    every = [runs for runs in experiments(rows) if runs.rows]
    main, by_size = every[0], [runs for runs in every if not runs.differs]
    sections = [_claims(by_size), delta_by_size(by_size)]
    with progress("plots", len(ABOUT_A_SIZE) * len(every)) as task:
        for make in ABOUT_A_SIZE:
            topic = []
            for runs in every:
                task.advance()
                if runs.differs and make not in ABOUT_A_SETTING:
                    continue
                section = make(runs)
                # Other sizes and settings appear where they have something to show.
                if runs is main or section.figures or (section.tables and not runs.differs):
                    topic.append((runs, section))
            several = len(topic) > 1
            said = ""
            for runs, section in topic:
                text = "" if section.text == said else section.text
                said = said or section.text
                sections.append(
                    _part(dataclasses.replace(section, text=text), runs, runs is main, several)
                )
    sections.append(_runs(every, rows, problems))
    return sections


def _part(section: Section, runs: Runs, main: bool, several: bool) -> Section:
    """A section as one of several sizes and settings, under a name of its own."""
    if not main:
        section = dataclasses.replace(
            section,
            id=f"{section.id}-{runs.name}",
            figures=[
                dataclasses.replace(figure, name=f"{figure.name}-{runs.name}")
                for figure in section.figures
            ],
        )
    differs = f"Setting, the main one's in brackets: {', '.join(runs.differs)}. "
    return dataclasses.replace(
        section,
        part=runs.label if several or not main else "",
        text=(differs if runs.differs else "") + section.text,
    )


def _claims(by_size: Sequence[Runs]) -> Section:
    """One line a claim and size; a size beside the main one counts where it has measured."""
    main, others = by_size[0], by_size[1:]
    lines, missing = [], []
    found = [claims(runs) for runs in by_size]
    for here, *elsewhere in zip(*found, strict=True):
        lines.append((here.claim, main.label, here.ours, here.verdict, here.published))
        lines += [
            ("", runs.label, one.ours, one.verdict, "")
            for runs, one in zip(others, elsewhere, strict=True)
            if not one.missing
        ]
        missing += [here] if here.missing else []
    size = claim_about_size(by_size)
    lines.append((size.claim, "all", size.ours, size.verdict, size.published))
    missing += [size] if size.missing else []
    lengths = ", ".join(f"{runs.label} at {runs.main_length:g}" for runs in by_size)
    return Section(
        "claims",
        "Published claims and what we find",
        f"Training tokens per weight: {lengths}.",
        tables=[
            Table(("claim", "size", "here", "verdict", f"published ({published.SOURCE})"), lines)
        ],
        notes=[RULE, *(f"Not measured: {one.claim}. Missing: {one.missing}." for one in missing)],
    )


def _runs(every: Sequence[Runs], rows: Sequence[Row], problems: Sequence[str]) -> Section:
    """All rows by size and setting, the longest trainings and the densest patterns first."""
    labels = {
        row.key: (number, runs.label) for number, runs in enumerate(every) for row in runs.rows
    }

    def order(row: Row) -> tuple[object, ...]:
        cell = row.cell
        density = -Pattern.parse(cell.pattern).density
        number = labels.get(row.key, (len(every), ""))[0]
        return number, -cell.tokens_per_weight, cell.kind, density, str(cell)

    table = Table(
        ("setting", "cell", "perplexity", "cloze", "zeros", "tokens", "seconds", "tokens/s", "key"),
        [
            (
                labels.get(row.key, (0, "–"))[1],
                str(row.cell),
                "diverged" if row.diverged else f"{row.perplexity:.3f}",
                "–" if row.accuracy is None else f"{row.accuracy:.1%}",
                "–" if row.zeros is None else f"{row.zeros:.1%}",
                _number(row.raw.get("tokens"), 1e6, "M"),
                _number(row.raw.get("seconds")),
                _number(row.raw.get("tokens_per_second"), 1e6, "M", 2),
                row.key,
            )
            for row in sorted(rows, key=order)
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


def _count(things: Sequence[object], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def _lead(rows: Sequence[Row]) -> list[str]:
    tokens, seconds = (
        sum(n for r in rows if (n := r.raw.get(name)) is not None and is_number(n))
        for name in ("tokens", "seconds")
    )
    environments = [e for r in rows if isinstance(e := r.raw.get("environment"), dict)]
    devices = sorted({str(e.get("device")) for e in environments})
    versions = sorted({f"torch {e.get('torch')}" for e in environments})
    commits = sorted({str(e["commit"])[:10] for e in environments if e.get("commit")})
    small = f"{tokens / 1e6:.{0 if tokens >= 1e7 else 2}f}M"
    many = f"{tokens / 1e9:.2f}G" if tokens >= 1e9 else small
    long = f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"
    return [
        f"{_count(rows, 'run')}, {many} training tokens, {long} of training one after the other.",
        ", ".join([*devices, *versions, *(f"commit {c}" for c in commits)]),
    ]
