"""The rows of a sweep.

Rows that cannot be used are left out and named; everything that a page says is made of the others.
"""

import json
import math
from pathlib import Path
from typing import Any

from sparse_bitnet.study.analysis import Runs, best_rates, sizes
from sparse_bitnet.study.cells import Cell
from sparse_bitnet.study.claims import claims
from sparse_bitnet.study.rows import ROWS_FILE, append_row, read_rows


def build(directory: Path) -> None:
    for kind in ("bf16", "bitnet"):
        for pattern, perplexity in (("dense", 30.0), ("6:8", 31.0), ("4:8", 33.0)):
            values = {"kind": kind, "pattern": pattern, "size": "study-5m"}
            cell = Cell.from_dict(values, "fuzz")
            row = {
                "key": str(cell),
                "cell": cell.to_dict(),
                "weights": 5_000_000,
                "config": {"optimizer": {"learning_rate": 1e-3}},
                "validation": {"perplexity": perplexity},
                "cloze": {"accuracy": 0.5},
                "history": {"tokens": [1, 2], "zeros": [0.3, 0.4], "loss": [3.0, 2.0]},
                "layers": {"names": ["a"], "tokens": [1], "zeros": [[0.4]]},
                "polarization": [],
            }
            append_row(directory / ROWS_FILE, row)


def read(directory: Path, mutation: Any) -> None:
    rows, problems = read_rows(directory)
    assert len(json.dumps(problems)) < 5000
    for size in sizes(rows):
        runs = Runs(rows, size)
        for row in runs.rows:
            assert math.isfinite(row.perplexity)
        best_rates(rows, size)
        claims(runs, [])
