"""Redraw this result from its rows: plots, tables.md, and the tables of the README.

The same rows give the same bytes (the plots with the matplotlib of constraints.txt).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import sections
from claims import RULE
from readme import tables
from runs import Runs, experiments
from sections import Section
from sparse_bitnet.files import atomic_file, write_text
from sparse_bitnet.study.rows import read_rows

HERE = Path(__file__).resolve().parents[1]
ABOUT_A_SIZE = (
    sections.collapse,
    sections.tokens_per_weight,
    sections.mask_cost,
    sections.group_size,
    sections.ablations,
    sections.dense_to_sparse,
    sections.cloze,
    sections.learning_rate,
    sections.losses,
    sections.flips,
    sections.zeros,
    sections.polarization,
)
# What the smaller batch of the curve over training length is shown for.
ABOUT_A_BATCH = (sections.tokens_per_weight, sections.mask_cost, sections.losses)


def draw(out: Path) -> None:
    """Write README.md, tables.md and plots/ into ``out``."""
    rows, problems = read_rows(HERE)
    assert not problems, problems
    every = experiments(rows)
    by_size = [runs for runs in every if runs.main]
    page = ["# Tables", "", "Drawn by `redraw` from `rows.jsonl.xz`.", "", RULE]
    for section in (sections.verdicts(by_size), sections.delta_by_size(by_size)):
        page += _markdown(section, "")
    (out / "plots").mkdir(parents=True, exist_ok=True)
    for make in ABOUT_A_SIZE:
        for runs in every:
            if not runs.main and make not in ABOUT_A_BATCH:
                continue
            section = make(runs)
            page += _markdown(section, runs.label)
            for name, png in section.pictures.items():
                path = out / "plots" / f"{_file_name(name, runs, every)}.png"
                with atomic_file(path) as temporary:
                    temporary.write_bytes(png)
    write_text(out / "tables.md", "\n".join(page) + "\n")
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    write_text(out / "README.md", _with_tables(readme, tables(every)))


def _file_name(name: str, runs: Runs, every: list[Runs]) -> str:
    return name if runs is every[0] else f"{name}-{runs.name}"


def _markdown(section: Section, label: str) -> list[str]:
    lines = []
    for table in section.tables:
        lines += ["", f"## {section.title}{f', {label}' if label else ''}", ""]
        lines += [_line(table.header), "|" + "---|" * len(table.header)]
        lines += [_line([cell.replace("|", "\\|") for cell in row]) for row in table.rows]
    return lines


def _line(cells: Sequence[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def _with_tables(text: str, drawn: dict[str, list[list[str]]]) -> str:
    """The text with the lines of each table, found by its header, in place of its own."""
    for header, lines in drawn.items():
        table = re.compile(rf"(?m)^{re.escape(header)}\n(\|[-|]+\|\n)(?:\|.*\n)+")
        assert len(table.findall(text)) == 1, header
        body = "".join(f"{_line(line)}\n" for line in lines)
        found = table.search(text)
        assert found is not None
        text = text.replace(found[0], f"{header}\n{found[1]}{body}")
    return text
