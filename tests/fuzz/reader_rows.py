"""The rows of a sweep, and the page that is made of them.

Rows that cannot be used are left out and named. Of the others the page is built, all but its
pictures, which get lists of finite numbers.
"""

import dataclasses
import importlib.util
import json
import math
from pathlib import Path

from sparse_bitnet.core import ConfigError
from sparse_bitnet.study import plots, report
from sparse_bitnet.study.rows import ROWS_FILE, append_row, read_rows

STUDY = Path(__file__).parents[1] / "study" / "conftest.py"


def build(directory):
    spec = importlib.util.spec_from_file_location("study_conftest", STUDY)
    assert spec is not None and spec.loader is not None
    made_up = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made_up)
    for kind in ("bf16", "bitnet"):
        for pattern, perplexity in (("dense", 30.0), ("6:8", 31.0), ("4:8", 33.0)):
            row = made_up.make_row(perplexity, kind=kind, pattern=pattern)
            row["config"] = {"optimizer": {"learning_rate": 1e-3}}
            append_row(directory / ROWS_FILE, row)
    for name in ("lines", "panels", "polarization"):
        assert callable(getattr(plots, name))
        setattr(plots, name, picture)


def picture(*drawn, **more):
    """In place of a plot: every number in what is to be drawn can be drawn."""
    todo = [*drawn, *more.values()]
    while todo:
        value = todo.pop()
        if dataclasses.is_dataclass(value):
            value = vars(value)
        if isinstance(value, dict):
            todo += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            todo += value
        elif not isinstance(value, str | bool | None):
            assert math.isfinite(value), value
    return b""


def read(directory, mutation):
    rows, problems = read_rows(directory)
    assert len(json.dumps(problems)) < 5000
    if any(not row.diverged for row in rows):
        sections = report.build(rows, problems)
        report.render("title", [], sections)
    if problems:  # the report says them instead of stopping
        raise ConfigError("; ".join(map(str, problems))[:500])
