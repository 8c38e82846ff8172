"""The result of 22 November 2026 comes from its rows, byte for byte, by its own script."""

import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "results" / "2026-11-22_evidence"
MODULES = ("claims", "figures", "published", "readme", "runs", "sections", "draw")


@pytest.fixture
def redraw(monkeypatch):
    """The script's modules, imported as when its directory is run."""
    monkeypatch.syspath_prepend(RESULT / "redraw")
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    modules = {name: import_module(name) for name in MODULES}
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name)
    return SimpleNamespace(**modules)


@pytest.mark.slow
def test_everything_is_redrawn_byte_for_byte(tmp_path):
    subprocess.run([sys.executable, RESULT / "redraw", tmp_path], check=True, timeout=280)
    stored = [RESULT / "README.md", RESULT / "tables.md", *RESULT.glob("plots/*.png")]
    names = {path.relative_to(RESULT) for path in stored}
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")} == names
    drawn_with = f"matplotlib=={version('matplotlib')}"
    if drawn_with not in (ROOT / "constraints.txt").read_text().split():
        stored = stored[:2]  # other releases draw other pixels
    for path in stored:
        assert path.read_bytes() == (tmp_path / path.relative_to(RESULT)).read_bytes(), path


def test_tables_are_those_of_the_rows(redraw, tmp_path, monkeypatch):
    """Without drawing: verdicts, tables and the README's figures."""
    for module, names in (
        (redraw.figures, ("collapse", "bars")),
        (redraw.sections.plots, ("lines", "panels", "polarization")),
    ):
        for name in names:
            assert callable(getattr(module, name))
            monkeypatch.setattr(module, name, lambda *_, **__: b"")
    redraw.draw.draw(tmp_path)
    for name in ("tables.md", "README.md"):
        assert (tmp_path / name).read_bytes() == (RESULT / name).read_bytes()
    assert sorted(p.name for p in tmp_path.glob("plots/*")) == sorted(
        p.name for p in RESULT.glob("plots/*")
    )


HOLDS, IN_PART, FAILS, NOT_DECIDED = (
    *("holds", "holds in part", "does not hold here"),
    "not decided",
)


@pytest.mark.parametrize(
    ("comparisons", "verdict"),
    [
        ([(1.0, 1.1, 0.9)], HOLDS),
        ([(1.0,)], IN_PART),  # one seed decides nothing
        ([(3.0, 0.1, -0.2)], IN_PART),  # a seed on the other side
        ([(1.0, 0.01)], IN_PART),  # within two standard errors
        ([(-1.0, 0.5)], FAILS),
        ([(0.0, 0.0)], FAILS),
        ([(1.0, 1.1), (-1.0, -1.1)], IN_PART),
        ([(1.0, 1.1), (2.0, 2.1)], HOLDS),
        ([(-1.0,), (-2.0,)], FAILS),
    ],
)
def test_the_rule_of_verdicts(redraw, comparisons, verdict):
    estimates = [redraw.runs.Estimate(values) for values in comparisons]
    assert redraw.claims.verdict_of(estimates) == verdict
    if verdict == HOLDS:
        assert redraw.claims.verdict_of(estimates, complete=False) == IN_PART


@pytest.mark.parametrize(
    ("comparisons", "verdict"),
    [
        ([(1.9,), (-0.9,), (-1.9,)], NOT_DECIDED),  # of either sign
        ([(2.0,)], IN_PART),  # not smaller than the spread
        ([(-2.0,)], FAILS),
        ([(1.9,), (-2.1,)], FAILS),  # none points the claimed way
        ([(1.9,), (1.0, 1.1)], IN_PART),  # what has seeds of its own is decided by them
        ([(1.0, 1.1)], HOLDS),
    ],
)
def test_one_seed_within_the_spread_of_its_baseline(redraw, comparisons, verdict):
    """Seeds at 50, 52 and 54: variance (4 + 0 + 4)/2, so a standard deviation of 2."""
    found = [redraw.runs.Estimate(values) for values in comparisons]
    baseline = redraw.runs.Estimate((50.0, 52.0, 54.0))
    assert redraw.claims.verdict_of(found, baseline) == verdict


def test_crossings_are_linear_in_the_logarithm(redraw):
    crossings = redraw.runs.crossings
    # Gaps −1 at 4 and +1 at 64: zero half way in the logarithm, at 16.
    assert crossings([4, 64], [-1, 1]) == [pytest.approx(16)]
    # +1 at 4, −1 at 16, +3 at 256: at 8, and a quarter of the way from 16 to 256.
    assert crossings([4, 16, 256], [1, -1, 3]) == [pytest.approx(8), pytest.approx(32)]
    assert crossings([4, 16, 64], [1, 2, 0.5]) == []


def test_first_beyond_goes_from_dense_to_sparse(redraw):
    ratios = {"2:8": 1.5, "6:8": 1.02, "4:8": 1.12, "3:8": 1.05}
    assert redraw.runs.first_beyond(ratios, 1.1) == "4:8"
    assert redraw.runs.first_beyond(ratios, 2.0) is None
