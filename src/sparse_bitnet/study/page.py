"""Self-contained HTML page: text, tables and pictures in one file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import pandas as pd

from sparse_bitnet.study.plots import DPI

CSS_DPI = 96
STYLE = """
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #1c1c1c;
  background: #fff; max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .4rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .5rem; border-top: 1px solid #dcdcdc;
  padding-top: 1.4rem; }
p.soft, figcaption { color: #5c5c5c; font-size: .9rem; }
figure { margin: 1.2rem 0; overflow-x: auto; }
figure img { display: block; max-width: max(100%, 30rem); height: auto; }
div { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; margin: .8rem 0; }
th, td { text-align: left; vertical-align: top; padding: .35rem .9rem .35rem 0;
  border-bottom: 1px solid #dcdcdc; font-variant-numeric: tabular-nums; white-space: nowrap; }
"""


class Figure(NamedTuple):
    """A picture: file name without suffix, PNG, and what it shows."""

    name: str
    png: bytes
    caption: str


class Section(NamedTuple):
    """A heading and what stands below it. Tables hold text alone."""

    title: str
    text: Sequence[str]  # paragraphs
    tables: Sequence[pd.DataFrame]
    figures: Sequence[Figure] = ()


def render(title: str, lead: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole page. All text is escaped; pictures are embedded as data URLs."""
    body = "".join(_section(number, section) for number, section in enumerate(sections))
    links = " · ".join(f'<a href="#s{i}">{escape(s.title)}</a>' for i, s in enumerate(sections))
    intro = "".join(f'<p class="soft">{escape(line)}</p>\n' for line in lead)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{intro}<nav>{links}</nav>\n{body}</body>\n</html>\n"
    )


def _section(number: int, section: Section) -> str:
    parts = [f'<section id="s{number}">', f"<h2>{escape(section.title)}</h2>"]
    parts += [f"<p>{escape(text)}</p>" for text in section.text]
    for table in section.tables:
        with pd.option_context("display.max_colwidth", None):
            html = table.to_html(index=False, border=0, justify="unset", na_rep="–")
        parts.append(f"<div>{html}</div>")
    return "\n".join([*parts, *map(_figure, section.figures), "</section>\n"])


def _figure(figure: Figure) -> str:
    data = base64.b64encode(figure.png).decode()
    # A PNG's width stands at its 16th byte. Shown so, text has one size in all pictures.
    width = int.from_bytes(figure.png[16:20], "big") * CSS_DPI // DPI
    return (
        f'<figure id="{figure.name}"><img alt="{escape(figure.caption, quote=True)}" '
        f'width="{width}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
    )
