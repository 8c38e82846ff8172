"""The page: every plot there, every picture readable, nothing fetched, gaps said."""

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
from sparse_bitnet.study.analysis import Runs
from sparse_bitnet.study.cells import Cell
from sparse_bitnet.study.report import report
from sparse_bitnet.study.rows import Row, append_row
from sparse_bitnet.study.sections_training import _by_layer

Make = Callable[..., dict[str, Any]]
PLOTS = {
    "collapse",
    "length",
    "mask-cost",
    "group-size",
    "ablations",
    "dense-to-sparse",
    "cloze",
    "loss",
    "flips",
    "zeros",
    "zeros-by-layer",
    "polarization",
    "polarization-training",
}
CHROMIUM = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
)


class Page(HTMLParser):
    """Pictures, section ids, addresses and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: dict[str, dict[str, str | None]] = {}
        self.sections: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self._figure = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.addresses += [v for k, v in attrs if k in ("src", "href") and v]
        if tag == "section":
            self.sections.append(values["id"] or "")
        elif tag == "figure":
            self._figure = (values["id"] or "").removeprefix("figure-")
        elif tag == "img":
            self.images[self._figure] = values

    def handle_data(self, data: str) -> None:
        self.text += data


def png_size(data: bytes) -> tuple[int, int]:
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_every_plot_is_on_the_page_and_beside_it(evidence: Path) -> None:
    written = report(evidence)
    page = Page(written.page.read_text(encoding="utf-8"))
    assert set(page.images) == PLOTS
    assert {path.stem for path in written.pictures} == PLOTS
    for name, image in page.images.items():
        alt, source = image["alt"] or "", image["src"] or ""
        assert len(alt) > 40, f"{name} has no alternative text"
        data = base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True)
        assert min(png_size(data)) > 300
        assert (evidence / "plots" / f"{name}.png").read_bytes() == data
    outside = [a for a in page.addresses if not a.startswith(("#", "data:image/png;base64,"))]
    assert outside == []
    assert {a[1:] for a in page.addresses if a.startswith("#")} == set(page.sections)


def test_figures_are_those_of_the_rows(evidence: Path) -> None:
    page = Page(report(evidence).page.read_text(encoding="utf-8"))
    assert "first beyond: 4:8 BF16, 3:8 BitNet" in page.text
    # BF16 costs 1.02, 1.05, 1.10, 1.13 at 4, 16, 64 and 100 tokens a weight, BitNet 1.06 to 1.07.
    # One seed at 64 is no point of a curve whose others have two and three.
    assert "The means cross at about 20 tokens per weight" in page.text
    assert "BitNet at 100 and BF16 at 4, 16 loses less." in page.text
    alt = page.images["length"]["alt"] or ""
    assert "BF16: 4 1.0" in alt and ", 100 1.1" in alt
    assert " 64 1" not in alt
    assert "Groups whose threshold is in the dead zone: BF16 50.0%, BitNet 90.0%." in page.text
    assert "second size" in page.text  # what the claim about size lacks


def test_sections_without_data_say_which_cells_are_missing(tmp_path: Path, make_row: Make) -> None:
    for pattern, perplexity in (("dense", 30.0), ("4:8", 32.0)):
        row = make_row(perplexity, None, kind="bitnet", pattern=pattern)
        row["polarization"] = None
        row["layers"] = {}
        append_row(tmp_path / "rows.jsonl", row)
    page = Page(report(tmp_path).page.read_text(encoding="utf-8"))
    assert set(page.images) == {"loss", "mask-cost", "flips", "zeros"}
    assert "collapse" in page.sections, "one pattern is a line of the table, no curve"
    assert "Missing: bf16 7:8, bf16 6:8" in page.text
    assert "Needs bitnet with each ablation. Missing: mask-then-quant" in page.text
    assert "not measured" in page.text


def test_hostile_rows_do_not_break_the_page(evidence: Path, make_row: Make) -> None:
    row = make_row(float("nan"), kind="bitnet", pattern="2:8", seed=7)
    row |= {"status": "diverged", "problem": "<script>alert(1)</script>"}
    append_row(evidence / "rows.jsonl", row)
    odd = make_row(40, kind="bf16", pattern="1:8")
    odd |= {"history": None, "polarization": [3], "layers": None, "tokens": "many", "weights": None}
    odd["environment"] = 5
    append_row(evidence / "rows.jsonl", odd)
    with (evidence / "rows.jsonl").open("a") as file:
        file.write('{"key": "cut sh')
    written = report(evidence)
    html = written.page.read_text(encoding="utf-8")
    assert len(written.problems) == 1
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert set(Page(html).images) == PLOTS


def test_a_second_size_gets_parts_of_its_own(evidence: Path, make_row: Make) -> None:
    for kind, dense in (("bf16", 20.0), ("bitnet", 25.0)):
        for pattern, factor in (("dense", 1.0), ("6:8", 1.01), ("4:8", 1.1)):
            row = make_row(dense * factor, kind=kind, pattern=pattern, size="study-20m")
            append_row(evidence / "rows.jsonl", row | {"weights": 20_000_000})
    page = Page(report(evidence).page.read_text(encoding="utf-8"))
    assert "collapse-study-20m" in page.sections
    assert "collapse-study-20m" in page.images
    assert "ablations-study-20m" not in page.sections
    assert "20M weights" in page.text
    # A topic has one heading, and its parts stand together.
    assert page.text.count("Where sparsity breaks the model") == 2, "list of contents and heading"
    place = page.sections.index("collapse")
    assert page.sections[place + 1] == "collapse-study-20m"
    # Each claim is judged on both sizes.
    assert page.text.count("first beyond: ") == 3, "published, and both sizes"


def test_a_second_setting_is_told_and_kept_apart(evidence: Path, make_row: Make) -> None:
    plain = Page(report(evidence).page.read_text(encoding="utf-8"))
    for kind, dense in (("bf16", 50.0), ("bitnet", 60.0)):
        for length, seed in ((100, 0), (100, 1), (8, 0), (8, 1)):
            for pattern, factor in (("dense", 1.0), ("6:8", 1.2), ("4:8", 1.5)):
                run = {"kind": kind, "seed": seed, "tokens_per_weight": length}
                row = make_row(dense * factor, pattern=pattern, **run)
                row["key"] += " small batch"
                row["config"] = {"data": {"batch_size": 16}}
                append_row(evidence / "rows.jsonl", row)
    page = Page(report(evidence).page.read_text(encoding="utf-8"))
    assert set(page.images) - set(plain.images) == {
        "collapse-study-5m-2",
        "length-study-5m-2",
        "mask-cost-study-5m-2",
        "loss-study-5m-2",
    }
    assert "4.7M weights, batch size 16" in page.text
    assert "Setting, the main one's in brackets: batch size 16 (not said)." in page.text
    assert page.text.count("first beyond: ") == 2, "claims are judged on main settings"
    same = plain.images["collapse"]["src"]
    assert page.images["collapse"]["src"] == same, "the main setting's figures are what they were"
    assert "1.500 ± 0.000 (2 seeds)" in page.text
    assert "1.500" not in plain.text


def test_what_the_mask_costs_is_the_difference_on_the_same_batches(
    tmp_path: Path, make_row: Make
) -> None:
    """4:8 is 0.25 above dense at seed 0, 0.5 below at seed 1, and seed 2 has no dense twin."""
    for seed, pattern, more in (
        *((0, "dense", 0.0), (0, "4:8", 0.25), (1, "dense", 0.0), (1, "4:8", -0.5)),
        *((2, "4:8", 9.0), (0, "6:8", 0.125)),
    ):
        row = make_row(30.0, kind="bf16", pattern=pattern, seed=seed)
        row["history"]["loss"] = [loss + seed + more for loss in row["history"]["loss"]]
        if pattern == "6:8":  # logged at other steps: only those of both count
            row["history"]["tokens"][:4] = [1.5e6, 2.5e6, 3.5e6, 4.5e6]
        append_row(tmp_path / "rows.jsonl", row)
    page = Page(report(tmp_path).page.read_text(encoding="utf-8"))
    alt = page.images["mask-cost"]["alt"] or ""
    assert alt.endswith("At the end: 6:8: BF16 0.125; 4:8: BF16 0.25, −0.5")


def test_a_size_that_remembers_and_lacks_a_twin(evidence: Path, make_row: Make) -> None:
    """BF16 at 4:8 is better on held-out text and worse in training; BitNet has no dense run."""
    for kind, pattern, held_out, more in (
        ("bf16", "dense", 3.3, 0.0),
        ("bf16", "4:8", 3.225, 0.3),
        ("bitnet", "4:8", 3.28, 0.5),
    ):
        run = {"kind": kind, "pattern": pattern, "size": "study-20m", "tokens_per_weight": 25}
        row = make_row(math.exp(held_out), **run)
        row["history"]["loss"] = [loss + more for loss in row["history"]["loss"]]
        append_row(evidence / "rows.jsonl", row | {"weights": 20_000_000})
    page = report(evidence).page.read_text(encoding="utf-8")
    images = Page(page).images
    assert "mask-cost-study-20m" in images
    # One pattern of one kind is no curve, and without BitNet's dense run no comparison of kinds.
    assert not {"collapse-study-20m", "cloze-study-20m", "length-study-20m"} & set(images)
    cost = "<td>+0.300 (1 seed)</td><td>−0.075 (1 seed)</td><td>–</td><td>–</td>"
    assert f"<td>4:8, 25 tokens per weight</td>{cost}" in page


def test_what_a_model_remembers_is_told_with_the_passes(tmp_path: Path, make_row: Make) -> None:
    """The last logged loss is 4.6, and 12M tokens are three passes over 4M."""
    for kind, seed, gap in (("bf16", 0, 0.2), ("bf16", 1, 0.3), ("bitnet", 0, -0.1)):
        row = make_row(math.exp(4.6 + gap), kind=kind, pattern="dense", seed=seed)
        append_row(tmp_path / "rows.jsonl", row | {"data": {"train": [3_000_000, 1_000_000]}})
    page = report(tmp_path).page.read_text(encoding="utf-8")
    assert "<td>dense</td><td>+0.250 ± 0.071 (2 seeds)</td><td>−0.100 (1 seed)</td>" in page
    assert "over the last 5% of training, after 3 passes over its text" in page


def test_nothing_to_report(tmp_path: Path, make_row: Make) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(DataError, match="no finished cell in its rows yet; run the sweep further"):
        report(tmp_path)
    row = make_row(float("nan"), pattern="6:8") | {"problem": "loss is not finite at step 3"}
    append_row(tmp_path / "rows.jsonl", row)
    with pytest.raises(DataError, match=r"none of its 1 runs gave.* bitnet 6:8 .* at step 3"):
        report(tmp_path)


def test_patterns_of_ones_own_are_in_tables_and_curves(tmp_path: Path, make_row: Make) -> None:
    """None of them is a published one; 1:4 comes behind the three that curves are drawn for."""
    measured = (("dense", 30.0), ("12:16", 31.5), ("2:4", 33.0), ("3:8", 36.0), ("1:4", 60.0))
    for kind in ("bf16", "bitnet"):
        for pattern, perplexity in measured:
            if pattern != "3:8":
                append_row(
                    tmp_path / "rows.jsonl", make_row(perplexity, kind=kind, pattern=pattern)
                )
    page = report(tmp_path).page.read_text(encoding="utf-8")
    one = "<td>{}</td><td>{} (1 seed)</td><td>{} (1 seed)</td><td>–</td><td>–</td>"
    for pattern, ratio in (("12:16", "1.050"), ("2:4", "1.100"), ("1:4", "2.000")):
        assert one.format(pattern, ratio, ratio) in page
    assert "<td>7:8</td>" not in page, "of N:8 nothing was measured"
    images = Page(page).images
    for name in ("loss", "flips", "mask-cost", "zeros"):
        alt = images[name]["alt"] or ""
        assert all(pattern in alt for pattern in ("12:16", "2:4", "1:4")), name
    assert {"polarization", "zeros-by-layer"} <= set(images)
    # Once one of N:8 is measured the published ones stand beside it, in order of density.
    for kind in ("bf16", "bitnet"):
        append_row(tmp_path / "rows.jsonl", make_row(36.0, kind=kind, pattern="3:8"))
    page = report(tmp_path).page.read_text(encoding="utf-8")
    table = page.partition("Perplexity of each model over")[2].partition("</table>")[0]
    order = ["7:8", "6:8", "12:16", "5:8", "4:8", "2:4", "3:8", "2:8", "1:4"]
    places = [table.index(f"<tr><td>{pattern}</td>") for pattern in order]
    assert places == sorted(places)


def test_zeros_stand_at_the_numbers_of_their_blocks(make_row: Make) -> None:
    """A rule skipped the first block, so the first that was measured is block 1."""
    row = make_row(30.0, kind="bitnet", pattern="6:8")
    for name in ("names", "zeros"):
        values = row["layers"][name] if name == "names" else row["layers"][name][0]
        del values[:4]
    cell = Cell(kind="bitnet", pattern="6:8")
    panels = _by_layer(Runs([Row("key", cell, 30.0, None, row)], "study-5m"))
    assert [list(curve.x) for curve in panels["q_proj"]] == [[1, 2]]
    assert panels["q_proj"][0].y == pytest.approx([34.0, 38.0])


def test_a_run_in_two_rows_is_one_seed(tmp_path: Path, make_row: Make) -> None:
    """Rows that two versions of the package wrote, of two keys."""
    for pattern in ("dense", "6:8"):
        row = make_row(30.0, kind="bitnet", pattern=pattern)
        append_row(tmp_path / "rows.jsonl", row)
        append_row(tmp_path / "rows.jsonl", row | {"key": f"{pattern} once more"})
    page = report(tmp_path).page.read_text(encoding="utf-8")
    assert "(1 seed)" in page
    assert "(2 seeds)" not in page


def test_kinds_of_different_batches_are_two_settings(tmp_path: Path, make_row: Make) -> None:
    for kind, batch, seeds in (("bf16", 128, (0, 1, 2)), ("bitnet", 16, (0, 1))):
        for seed in seeds:
            for pattern, perplexity in (("dense", 30.0), ("6:8", 31.0), ("4:8", 33.0)):
                row = make_row(perplexity, kind=kind, pattern=pattern, seed=seed)
                append_row(
                    tmp_path / "rows.jsonl", row | {"config": {"data": {"batch_size": batch}}}
                )
    page = Page(report(tmp_path).page.read_text(encoding="utf-8"))
    assert "Training tokens per weight: 4.7M weights at 100." in page.text
    assert "Setting, the main one's in brackets: batch size 16 (128)." in page.text
    assert "4.7M weights, batch size 16" in page.text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine to open the page with")
def test_chromium_shows_the_plots(evidence: Path, tmp_path: Path) -> None:
    page = report(evidence).page
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
