"""A self-contained HTML page: text, tables and pictures in one file, nothing fetched."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby

from sparse_bitnet.study.plots import DPI

CSS_DPI = 96
WIDE = 700  # pixels of a picture that a small screen scrolls rather than shrinks to nothing
LONG_CELL = 60  # characters: a table of prose, which wants room

STYLE = """
:root { color-scheme: light; --ink: #1c1c1c; --soft: #5c5c5c; --line: #dcdcdc; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: var(--ink);
  background: #fff; max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .4rem; }
h3 { font-size: 1.02rem; margin: 1.9rem 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .5rem; border-top: 1px solid var(--line);
  padding-top: 1.4rem; }
p.lead, p.note, figcaption, nav { color: var(--soft); }
p.note { font-size: .9rem; }
nav ul { list-style: none; margin: 1.2rem 0 0; padding: 0; columns: 22rem; }
nav li { margin: 0 0 .3rem; break-inside: avoid; }
nav a.part { font-size: .88rem; margin-left: .5rem; white-space: nowrap; }
a { color: #0b5fa5; }
figure { margin: 1.2rem 0; overflow-x: auto; }
figure img { display: block; max-width: max(100%, 30rem); height: auto; }
figure img.wide { max-width: max(100%, 44rem); }
figcaption { font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; margin: .8rem 0; }
th, td { text-align: left; vertical-align: top; padding: .35rem .9rem .35rem 0;
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
table:not(.text) td { white-space: nowrap; }
table.text { min-width: 46rem; }
td.verdict { font-weight: 600; white-space: nowrap; }
code { font-size: .9em; }
"""


@dataclass(frozen=True)
class Figure:
    """A picture: file name without suffix, PNG, what it shows (alt text), and how to read it."""

    name: str
    png: bytes
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Table:
    """Cells as plain text; a column headed ``verdict`` is set in bold."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it; ``notes`` are small print (what is missing, how read).

    Sections of one title that follow each other are one topic: its heading comes once, and each
    ``part`` (a size, a setting) has one of its own below.
    """

    id: str
    title: str
    text: str = ""
    figures: Sequence[Figure] = field(default_factory=list)
    tables: Sequence[Table] = field(default_factory=list)
    notes: Sequence[str] = field(default_factory=list)
    part: str = ""


def needs(what: str, missing: Sequence[str]) -> list[str]:
    """The note of a section that lacks runs; none if nothing is missing, ``["all"]`` names none."""
    if not missing:
        return []
    named = "" if list(missing) == ["all"] else f" Missing: {', '.join(missing)}."
    return [f"Needs {what}.{named}"]


def render(title: str, lead: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole page. All text is escaped; pictures are embedded as data URLs."""
    topics = [list(group) for _, group in groupby(sections, key=lambda section: section.title)]
    links = "".join(_links(topic) for topic in topics)
    body = "\n".join(
        _section(section, first=section is topic[0]) for topic in topics for section in topic
    )
    intro = "".join(f'<p class="lead">{escape(line)}</p>\n' for line in lead)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>{escape(title)}</h1>\n{intro}<nav><ul>{links}</ul></nav>\n</header>\n<main>\n"
        f"{body}\n</main>\n</body>\n</html>\n"
    )


def _links(topic: Sequence[Section]) -> str:
    """A topic's line in the list of contents: the first part by the title, the others by theirs."""
    first, *others = topic
    parts = "".join(f' <a class="part" href="#{s.id}">{escape(s.part)}</a>' for s in others)
    return f'<li><a href="#{first.id}">{escape(first.title)}</a>{parts}</li>'


def _section(section: Section, first: bool) -> str:
    parts = [f'<section id="{section.id}">']
    parts += [f"<h2>{escape(section.title)}</h2>"] if first else []
    parts += [f"<h3>{escape(section.part)}</h3>"] if section.part else []
    if section.text:
        parts.append(f"<p>{escape(section.text)}</p>")
    parts += [_table(table) for table in section.tables]
    parts += [_figure(figure) for figure in section.figures]
    parts += [f'<p class="note">{escape(note)}</p>' for note in section.notes]
    return "\n".join([*parts, "</section>"])


def _figure(figure: Figure) -> str:
    data = base64.b64encode(figure.png).decode()
    caption = f"<figcaption>{escape(figure.caption)}</figcaption>" if figure.caption else ""
    # A PNG's width stands at its 16th byte. Shown so, text has one size in all pictures.
    width = int.from_bytes(figure.png[16:20], "big") * CSS_DPI // DPI
    wide = ' class="wide"' if width > WIDE else ""
    return (
        f'<figure id="figure-{figure.name}"><img alt="{escape(figure.alt, quote=True)}" '
        f'width="{width}"{wide} src="data:image/png;base64,{data}">{caption}</figure>'
    )


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.header)
    rows = []
    for row in table.rows:
        cells = [
            f'<td class="verdict">{escape(cell)}</td>'
            if name == "verdict"
            else f"<td>{escape(cell)}</td>"
            for name, cell in zip(table.header, row, strict=True)
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    longest = max((len(cell) for row in table.rows for cell in row), default=0)
    prose = ' class="text"' if longest > LONG_CELL else ""
    return (
        f'<div class="scroll"><table{prose}>{caption}<thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
