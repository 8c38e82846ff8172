"""The page: every plot there, every picture readable, nothing fetched, gaps left open."""

from __future__ import annotations

import base64
import math
import shutil
import struct
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sparse_bitnet.core import DataError
from sparse_bitnet.study.report import report
from sparse_bitnet.study.rows import append_row

Make = Callable[..., dict[str, Any]]
TRAINING = {"loss", "mask-cost", "flips", "zeros", "polarization"}
PLOTS = {
    "ratio-study-5m-100",
    "length-study-5m-4-8",
    *(f"{name}-study-5m-100" for name in TRAINING),
}
CHROMIUM = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
)


class Page(HTMLParser):
    """Pictures, section ids, addresses, rows of tables and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: dict[str, dict[str, str | None]] = {}
        self.sections: list[str] = []
        self.addresses: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self._figure = ""
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.addresses += [v for k, v in attrs if k in ("src", "href") and v]
        if tag == "section":
            self.sections.append(values["id"] or "")
        elif tag == "figure":
            self._figure = values["id"] or ""
        elif tag == "img":
            self.images[self._figure] = values
        elif tag == "tr":
            self.rows.append([])
        self._in_cell = tag in ("td", "th")

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_cell:
            self.rows[-1].append(data)


def page_of(directory: Path) -> Page:
    return Page(report(directory).read_text(encoding="utf-8"))


def png_size(data: bytes) -> tuple[int, int]:
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_every_plot_is_on_the_page_and_beside_it(evidence: Path) -> None:
    written = report(evidence)
    page = Page(written.read_text(encoding="utf-8"))
    assert set(page.images) == PLOTS
    assert {path.stem for path in (evidence / "plots").iterdir()} == PLOTS
    for name, image in page.images.items():
        alt, source = image["alt"] or "", image["src"] or ""
        assert len(alt) > 30, f"{name} has no alternative text"
        data = base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True)
        assert min(png_size(data)) > 300
        assert (evidence / "plots" / f"{name}.png").read_bytes() == data
    outside = [a for a in page.addresses if not a.startswith(("#", "data:image/png;base64,"))]
    assert outside == []
    assert {a[1:] for a in page.addresses if a.startswith("#")} == set(page.sections)


def test_figures_are_those_of_the_rows(tmp_path: Path, make_row: Make) -> None:
    """4:8 costs BF16 10 and 20 %, an ablation 1.5 more; one pattern is no curve."""
    for pattern, seed, perplexity in (("dense", 0, 20), ("4:8", 0, 22), ("4:8", 1, 24)):
        append_row(
            tmp_path / "rows.jsonl", make_row(perplexity, kind="bf16", pattern=pattern, seed=seed)
        )
    append_row(tmp_path / "rows.jsonl", make_row(20, None, kind="bf16", pattern="dense", seed=1))
    odd = make_row(23.5, kind="bf16", pattern="4:8", method="masked-gradient")
    append_row(tmp_path / "rows.jsonl", odd)
    page = page_of(tmp_path)
    main = "study-5m, 100 tokens per weight"
    assert [main, "4:8", "23.00 ± 1.41 (2 seeds)", "1.150 ± 0.071 (2 seeds)"] in [
        row[:4] for row in page.rows
    ]
    assert [f"{main}, masked-gradient", "4:8", "23.50 (1 seed)", "+1.50 (1 seed)"] in [
        row[:4] for row in page.rows
    ]
    assert "BitNet perplexity" not in page.text
    assert not any(name.startswith(("ratio", "length")) for name in page.images)


def test_rows_that_lack_much_make_a_smaller_page(tmp_path: Path, make_row: Make) -> None:
    for pattern, perplexity in (("dense", 30.0), ("4:8", 32.0)):
        row = make_row(perplexity, None, kind="bitnet", pattern=pattern)
        row["polarization"] = None
        append_row(tmp_path / "rows.jsonl", row)
    page = page_of(tmp_path)
    assert {name.partition("-study")[0] for name in page.images} == TRAINING - {"polarization"}
    assert "cloze, %" not in page.text


def test_hostile_rows_do_not_break_the_page(evidence: Path, make_row: Make) -> None:
    row = make_row(float("nan"), kind="bitnet", pattern="2:8", seed=7)
    row |= {"status": "diverged", "problem": "<script>alert(1)</script>"}
    append_row(evidence / "rows.jsonl", row)
    odd = make_row(40, kind="bf16", pattern="1:8") | {"key": "<b>&amp;"}
    odd |= {"history": None, "polarization": None, "tokens": None, "environment": None}
    append_row(evidence / "rows.jsonl", odd)
    append_row(evidence / "rows.jsonl", odd | {"tokens": "many"})
    with (evidence / "rows.jsonl").open("a") as file:
        file.write('{"key": "half a l')
    written = report(evidence)
    text = written.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<b>" not in text
    page = Page(text)
    assert "<b>&amp;" in page.text
    assert "bitnet 2:8 study-5m seed 7 100 t/w diverged: <script>alert(1)</script>" in page.text
    assert page.text.count("skipped") == 2
    assert "skipped, tokens is 'many': it must be a valid number" in page.text


def test_sizes_and_settings_are_kept_apart(evidence: Path, make_row: Make) -> None:
    for pattern, perplexity in (("dense", 60.0), ("6:8", 63.0), ("4:8", 66.0)):
        row = make_row(perplexity, kind="bf16", pattern=pattern, size="study-1m")
        append_row(evidence / "rows.jsonl", row | {"weights": 1_179_648})
        small = make_row(perplexity, kind="bf16", pattern=pattern)
        config = {"data": {"batch_size": 16}}
        append_row(evidence / "rows.jsonl", small | {"key": f"{pattern} small", "config": config})
    page = page_of(evidence)
    names = {name.removeprefix("ratio-") for name in page.images if name.startswith("ratio")}
    assert len(names) == 3 and {"study-5m-100", "study-1m-100"} < names
    assert any("batch-size-16" in name for name in names)
    sections = [row[0] for row in page.rows if row and row[0].startswith("study")]
    assert sections.index("study-1m, 100 tokens per weight") > sections.index(
        "study-5m, 100 tokens per weight"
    ), "the size with most runs comes first"


def test_what_the_mask_costs_is_the_difference_on_the_same_batches(
    tmp_path: Path, make_row: Make
) -> None:
    """4:8 is 0.25 above dense at seed 0, 0.5 below at seed 1, and seed 2 has no baseline."""
    for seed, pattern, more in (
        *((0, "dense", 0.0), (0, "4:8", 0.25), (1, "dense", 0.0), (1, "4:8", -0.5)),
        *((2, "4:8", 9.0), (0, "6:8", 0.125)),
    ):
        held_out = 30.0 * math.exp(0.1) if pattern == "4:8" else 30.0
        row = make_row(held_out, kind="bf16", pattern=pattern, seed=seed)
        row["history"]["loss"] = [loss + seed + more for loss in row["history"]["loss"]]
        if pattern == "6:8":  # logged at other steps: only those of both count
            row["history"]["tokens"][:4] = [1.5e6, 2.5e6, 3.5e6, 4.5e6]
        append_row(tmp_path / "rows.jsonl", row)
    page = page_of(tmp_path)
    alt = page.images["mask-cost-study-5m-100"]["alt"] or ""
    assert alt.endswith("At the end: 6:8: BF16 0.125; 4:8: BF16 0.25, -0.5.")
    assert [
        *("4:8", "BF16", "−0.125 ± 0.530 (2 seeds)", "+0.100 ± 0.000 (2 seeds)"),
    ] in page.rows


def test_nothing_to_report(tmp_path: Path, make_row: Make) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(DataError, match="no finished cell in its rows yet; run the sweep further"):
        report(tmp_path)
    row = make_row(float("nan"), pattern="6:8") | {"problem": "loss is not finite at step 3"}
    append_row(tmp_path / "rows.jsonl", row)
    with pytest.raises(DataError, match=r"none of its 1 runs gave.* bitnet 6:8 .* at step 3"):
        report(tmp_path)


def test_patterns_of_ones_own_are_in_order_of_density(tmp_path: Path, make_row: Make) -> None:
    measured = (("1:4", 60.0), ("dense", 30.0), ("2:4", 33.0), ("12:16", 31.5), ("3:8", 36.0))
    for kind in ("bf16", "bitnet"):
        for pattern, perplexity in measured:
            append_row(tmp_path / "rows.jsonl", make_row(perplexity, kind=kind, pattern=pattern))
    page = page_of(tmp_path)
    table = [row for row in page.rows if len(row) > 2 and row[0].startswith("study-5m, 100")]
    assert [row[1] for row in table] == ["dense", "12:16", "2:4", "3:8", "1:4"]
    assert [row[3] for row in table][1:] == [
        f"{ratio} (1 seed)" for ratio in ("1.050", "1.100", "1.200", "2.000")
    ]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine to open the page with")
def test_chromium_shows_the_plots(evidence: Path, tmp_path: Path) -> None:
    page = report(evidence)
    probe = evidence / "probe.html"
    # After loading, the page itself counts the pictures that it could decode.
    count = (
        "<script>addEventListener('load', () => { const shown = [...document.images].filter("
        "i => i.complete && i.naturalWidth > 300); document.title = 'decoded ' + shown.length; "
        "});</script></body>"
    )
    probe.write_text(page.read_text(encoding="utf-8").replace("</body>", count), encoding="utf-8")
    shown = subprocess.run(
        [
            str(CHROMIUM),
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            f"--user-data-dir={tmp_path / 'profile'}",
            *("--virtual-time-budget=10000", "--dump-dom", probe.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    found = Page(shown)
    assert set(found.images) == PLOTS
    assert f"decoded {len(PLOTS)}" in found.text
