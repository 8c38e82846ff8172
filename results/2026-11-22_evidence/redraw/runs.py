"""Figures out of rows: selection, spread over seeds, ratios to the same model without a mask."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from sparse_bitnet.core import Pattern
from sparse_bitnet.study.rows import Row

KINDS = ("bf16", "bitnet")
SHOWN_PATTERNS = ("6:8", "4:8", "2:8")


@dataclass(frozen=True)
class Estimate:
    """One figure measured with several seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return math.fsum(self.values) / len(self.values)

    @property
    def spread(self) -> float:
        """Sample standard deviation over seeds; 0 with one seed."""
        if len(self.values) < 2:
            return 0.0
        mean = self.mean
        return math.sqrt(math.fsum((v - mean) ** 2 for v in self.values) / (len(self.values) - 1))

    @property
    def standard_error(self) -> float:
        return self.spread / math.sqrt(len(self.values))

    def text(self, digits: int = 2, sign: bool = False, seeds: bool = True) -> str:
        """``1.07 ± 0.01 (3 seeds)``; without a spread where there is one seed."""
        mean = signed(self.mean, digits) if sign else f"{self.mean:.{digits}f}"
        count = len(self.values)
        spread = f" ± {self.spread:.{digits}f}" if count > 1 else ""
        return mean + spread + (f" ({count} seed{'s' * (count > 1)})" if seeds else "")


def signed(value: float, digits: int = 2) -> str:
    """With its sign, a true minus: ``−1.25``."""
    return f"{value:+.{digits}f}".replace("-", "−")


def text_of(estimate: Estimate | None, digits: int = 2, sign: bool = False) -> str:
    """For a table: :meth:`Estimate.text`, or a dash where nothing was measured."""
    return "–" if estimate is None else estimate.text(digits, sign)


class Runs:
    """Rows of one size and batch, with the values of the main grid as defaults.

    The main grid is the published method, sparse from scratch, at the training length (tokens per
    weight) that most of its rows have.
    """

    def __init__(self, rows: Sequence[Row], name: str, main: bool, batch: int = 0) -> None:
        self.name, self.main, self.batch = name, main, batch
        # One run said in two ways (the recipe's learning rate once more) counts once.
        self.rows = list(
            {(replace(r.cell, learning_rate=None), r.learning_rate): r for r in rows}.values()
        )
        self.weights = float(self.rows[0].raw["weights"])
        plain = [r for r in self.rows if r.cell.method == "published" and not r.cell.until]
        lengths = Counter(row.cell.tokens_per_weight for row in plain)
        # Of equally many, the longer one: short runs serve the curve over tokens per weight.
        self.main_length = max(lengths, key=lambda n: (lengths[n], n))
        # Most cells have the rate that was chosen.
        self.main_rate = {
            kind: Counter(r.learning_rate for r in plain if r.cell.kind == kind).most_common(1)[0][
                0
            ]
            for kind in KINDS
        }

    @property
    def label(self) -> str:
        """``4.7M weights``, and the batch where it is not the main one."""
        millions = self.weights / 1e6
        size = f"{millions:.{millions < 10:d}f}M weights"
        return f"{size}, batch size {self.batch}" if self.batch else size

    def select(self, **wanted: Any) -> list[Row]:
        """Rows whose cell has these values; what is not named has the main grid's."""
        return [
            r for r in self._matching(**wanted) if r.learning_rate == self.main_rate[r.cell.kind]
        ]

    def _matching(self, **wanted: Any) -> list[Row]:
        grid = {"method": "published", "until": (), "tokens_per_weight": self.main_length}
        fields = grid | wanted
        return [r for r in self.rows if all(getattr(r.cell, k) == v for k, v in fields.items())]

    def rates(self, kind: str) -> dict[float, float]:
        """Learning rate → perplexity of the dense model of the lowest seed."""
        found = self._matching(kind=kind, pattern="dense")
        found.sort(key=lambda row: -row.cell.seed)
        return dict(sorted((float(r.learning_rate or 0), r.perplexity) for r in found))

    def one(self, **wanted: Any) -> Row | None:
        """The row of the lowest seed, or None."""
        return min(self.select(**wanted), key=lambda row: row.cell.seed, default=None)

    def perplexity(self, **wanted: Any) -> Estimate | None:
        values = {row.cell.seed: row.perplexity for row in self.select(**wanted)}
        return Estimate(tuple(values.values())) if values else None

    def ratio(self, kind: str, pattern: str, **wanted: Any) -> Estimate | None:
        """Perplexity over that of the dense model of the same seed."""
        pairs = self._pairs(kind, pattern, "perplexity", **wanted)
        return Estimate(tuple(here / dense for here, dense in pairs.values())) if pairs else None

    def delta(self, kind: str, pattern: str) -> Estimate | None:
        """Perplexity minus that of the dense model of the same seed."""
        found = self.deltas(kind, pattern)
        return Estimate(tuple(found.values())) if found else None

    def deltas(self, kind: str, pattern: str, figure: str = "perplexity") -> dict[int, float]:
        """A figure (``perplexity``, ``accuracy``) minus the dense model's, by seed."""
        pairs = self._pairs(kind, pattern, figure)
        return {seed: here - dense for seed, (here, dense) in pairs.items()}

    def advantage(self, pattern: str, figure: str = "ratio", **wanted: Any) -> Estimate | None:
        """BF16 minus BitNet, by seed, of the ratio or the difference to the dense model.

        Above 0: BitNet loses less.
        """
        bf16 = self._pairs("bf16", pattern, "perplexity", **wanted)
        bitnet = self._pairs("bitnet", pattern, "perplexity", **wanted)

        def loss(pair: tuple[float, float]) -> float:
            return pair[0] / pair[1] if figure == "ratio" else pair[0] - pair[1]

        both = sorted(bf16.keys() & bitnet.keys())
        values = tuple(loss(bf16[seed]) - loss(bitnet[seed]) for seed in both)
        return Estimate(values) if values else None

    def excess(self, reference: dict[str, Any], **wanted: Any) -> Estimate | None:
        """Perplexity minus that of ``reference``'s run of the same seed."""
        base = {row.cell.seed: row.perplexity for row in self.select(**reference)}
        values = [
            r.perplexity - base[r.cell.seed] for r in self.select(**wanted) if r.cell.seed in base
        ]
        return Estimate(tuple(values)) if values else None

    def patterns(self) -> list[str]:
        """Sparse patterns of the main grid, densest first."""
        found = {row.cell.pattern for row in self.select() if row.cell.pattern != "dense"}
        return sorted(found, key=lambda p: (-Pattern.parse(p).density, Pattern.parse(p).m))

    def drawn(self) -> list[str]:
        """Patterns that have curves over training: dense, and those that the paper shows."""
        measured = self.patterns()
        chosen = sorted(measured, key=lambda p: p not in SHOWN_PATTERNS)[:3]
        return ["dense", *(p for p in measured if p in chosen)]

    def lengths(self, pattern: str) -> list[float]:
        """Tokens per weight at which some kind has both the pattern and its dense model."""
        plain = [r.cell for r in self.rows if r.cell.method == "published" and not r.cell.until]
        have = {(c.kind, c.pattern, c.tokens_per_weight) for c in plain}
        return sorted({t for kind, p, t in have if p == pattern and (kind, "dense", t) in have})

    def steps(self, tokens_per_weight: float) -> list[int]:
        """Optimizer steps of the plain runs of a length, ascending."""
        return sorted({r.raw["steps"] for r in self.select(tokens_per_weight=tokens_per_weight)})

    def _pairs(
        self, kind: str, pattern: str, figure: str, **wanted: Any
    ) -> dict[int, tuple[float, float]]:
        here = {r.cell.seed: r for r in self.select(kind=kind, pattern=pattern, **wanted)}
        dense = {r.cell.seed: r for r in self.select(kind=kind, pattern="dense", **wanted)}
        both = {
            s: (getattr(here[s], figure), getattr(dense[s], figure)) for s in here if s in dense
        }
        return {s: pair for s, pair in sorted(both.items()) if None not in pair}


def dead_zone_groups(row: Row) -> float:
    """Fraction of all groups whose pruning threshold lies in the dead zone, after training."""
    found = [one for one in row.polarization if one["position"] == "all"]
    return float(found[-1]["dead_zone_groups"])


def experiments(rows: Sequence[Row]) -> list[Runs]:
    """The rows by size and batch, the size and the batch with most rows first.

    The smaller batch of the curve over training length has a learning rate and a warm-up of its
    own; nothing else differs within a size.
    """
    found = []
    for size, _ in Counter(row.cell.size for row in rows).most_common():
        of_size = [row for row in rows if row.cell.size == size]
        batches = Counter(row.raw["config"]["data"]["batch_size"] for row in of_size)
        for number, (batch, _) in enumerate(batches.most_common()):
            group = [r for r in of_size if r.raw["config"]["data"]["batch_size"] == batch]
            name = f"{size}-{number + 1}" if number else size
            found.append(Runs(group, name, main=not number, batch=batch if number else 0))
    return found


def crossings(lengths: Sequence[float], gaps: Sequence[float]) -> list[float]:
    """Where a difference of two curves changes its sign: linear between points in log(x)."""
    found = []
    for (x0, g0), (x1, g1) in pairwise(zip(lengths, gaps, strict=True)):
        if g0 <= 0 < g1 or g1 <= 0 < g0:
            part = g0 / (g0 - g1)
            found.append(math.exp(math.log(x0) + part * (math.log(x1) - math.log(x0))))
    return found


def first_beyond(ratios: dict[str, float], limit: float) -> str | None:
    """The densest pattern whose ratio exceeds the limit; None if none does."""
    ordered = sorted(ratios, key=lambda p: -Pattern.parse(p).density)
    return next((p for p in ordered if ratios[p] > limit), None)
