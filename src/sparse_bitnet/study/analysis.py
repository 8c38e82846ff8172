"""Numbers out of rows: selection, spread over seeds, ratios to the same model unmasked."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from sparse_bitnet.core import Pattern
from sparse_bitnet.study.rows import Row, is_number

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

    def text(self, digits: int = 2, sign: bool = False) -> str:
        """``1.07 ± 0.01 (3 seeds)``; without a spread where there is one seed."""
        mean = signed(self.mean, digits) if sign else f"{self.mean:.{digits}f}"
        if len(self.values) < 2:
            return f"{mean} (1 seed)"
        return f"{mean} ± {self.spread:.{digits}f} ({len(self.values)} seeds)"


def signed(value: float, digits: int = 2) -> str:
    """With its sign, a true minus: ``−1.25``."""
    return f"{value:+.{digits}f}".replace("-", "−")


def text_of(estimate: Estimate | None, digits: int = 2, sign: bool = False) -> str:
    """For a table: :meth:`Estimate.text`, or a dash where nothing was measured."""
    return "–" if estimate is None else estimate.text(digits, sign)


class Runs:
    """Rows of one size and setting, with the values of the main grid as defaults.

    The main grid is the published method, sparse from scratch, at the training length
    (tokens per weight) that most of its rows have. Whether rows were trained in one setting is
    :func:`sparse_bitnet.study.experiments.experiments`' to see to.

    Args:
        rows: those of other sizes, and diverged ones, are left out.
        size: a preset's name.
        name: short and unique in a report; the size if left out.
        differs: what is otherwise than in the size's main setting; empty for that itself.
    """

    def __init__(
        self, rows: Iterable[Row], size: str, name: str = "", differs: Sequence[str] = ()
    ) -> None:
        self.size = size
        self.name = name or size
        self.differs = list(differs)
        usable = [row for row in rows if row.cell.size == size and not row.diverged]
        # One run in rows of two versions, or of two ways to say its rate, counts once.
        self.rows = list(
            {(replace(r.cell, learning_rate=None), r.learning_rate): r for r in usable}.values()
        )
        plain = [r for r in self.rows if r.cell.method == "published" and not r.cell.until]
        lengths = Counter(row.cell.tokens_per_weight for row in plain)
        # Of equally many, the longer one: short runs serve the curve over tokens per weight.
        self.main_length = max(lengths, key=lambda n: (lengths[n], n)) if lengths else math.nan
        # A learning rate is chosen by its dense model's perplexity, and most cells have that one.
        self.main_rate = {
            kind: Counter(r.learning_rate for r in plain if r.cell.kind == kind).most_common(1)[0][
                0
            ]
            for kind in {row.cell.kind for row in plain}
        }

    @property
    def weights(self) -> float:
        """Weights of the model's linears; 0 if no row says."""
        counts = (r.raw.get("weights") for r in self.rows)
        return next((float(n) for n in counts if n is not None and is_number(n) and n > 0), 0.0)

    @property
    def label(self) -> str:
        """The size as people say it, ``4.7M weights``, and in what the setting differs."""
        millions = self.weights / 1e6
        size = f"{millions:.{millions < 10:d}f}M weights" if millions else self.size
        return f"{size}, {self.differs[0].partition(' (')[0]}" if self.differs else size

    def select(self, **wanted: Any) -> list[Row]:
        """Rows whose cell has these values; what is not named has the main grid's.

        The learning rate is the one that most rows of the kind have.
        """
        fields = {
            "method": "published",
            "until": (),
            "tokens_per_weight": self.main_length,
            **wanted,
        }
        return [
            r
            for r in self.rows
            if all(getattr(r.cell, k) == v for k, v in fields.items())
            and r.learning_rate == self.main_rate.get(r.cell.kind, r.learning_rate)
        ]

    def rates(self, kind: str) -> dict[float, float]:
        """Learning rate → perplexity of the dense model of the lowest seed, at the main length."""
        fields = {
            "kind": kind,
            "pattern": "dense",
            "method": "published",
            "until": (),
            "tokens_per_weight": self.main_length,
        }
        found = [r for r in self.rows if all(getattr(r.cell, k) == v for k, v in fields.items())]
        found.sort(key=lambda row: -row.cell.seed)
        rates = {r.learning_rate: r.perplexity for r in found if r.learning_rate is not None}
        return dict(sorted(rates.items()))

    def one(self, **wanted: Any) -> Row | None:
        """The row of the lowest seed, or None."""
        return min(self.select(**wanted), key=lambda row: row.cell.seed, default=None)

    def perplexity(self, **wanted: Any) -> Estimate | None:
        values = {row.cell.seed: row.perplexity for row in self.select(**wanted)}
        return Estimate(tuple(values.values())) if values else None

    def ratio(self, kind: str, pattern: str, **wanted: Any) -> Estimate | None:
        """Perplexity over that of the unmasked twin of the same seed."""
        pairs = self._pairs(kind, pattern, "perplexity", **wanted)
        return Estimate(tuple(here / dense for here, dense in pairs.values())) if pairs else None

    def delta(
        self, kind: str, pattern: str, figure: str = "perplexity", **wanted: Any
    ) -> Estimate | None:
        """A figure (``perplexity``, ``accuracy``) minus that of the unmasked twin."""
        found = self.deltas(kind, pattern, figure, **wanted)
        return Estimate(tuple(found.values())) if found else None

    def deltas(
        self, kind: str, pattern: str, figure: str = "perplexity", **wanted: Any
    ) -> dict[int, float]:
        """:meth:`delta` by seed."""
        pairs = self._pairs(kind, pattern, figure, **wanted)
        return {seed: here - dense for seed, (here, dense) in pairs.items()}

    def advantage(self, pattern: str, figure: str = "ratio", **wanted: Any) -> Estimate | None:
        """BF16 minus BitNet, by seed, of the ratio or the difference to the unmasked twin.

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

    def patterns(self, m: int | None = None) -> list[str]:
        """Sparse patterns of the main grid, densest first; of one group size if given."""
        found = {row.cell.pattern for row in self.select() if row.cell.pattern != "dense"}
        chosen = [p for p in found if m is None or Pattern.parse(p).m == m]
        return sorted(chosen, key=lambda p: (-Pattern.parse(p).density, Pattern.parse(p).m))

    def drawn(self) -> list[str]:
        """Patterns that have curves over training: dense, and up to three others.

        Those that the paper shows come first, then others that were measured.
        """
        measured = self.patterns()
        chosen = sorted(measured, key=lambda p: p not in SHOWN_PATTERNS)[:3]
        return ["dense", *(p for p in measured if p in chosen)]

    def lengths(self, pattern: str) -> list[float]:
        """Tokens per weight at which some kind has both the pattern and its dense twin."""
        plain = [r.cell for r in self.rows if r.cell.method == "published" and not r.cell.until]
        have = {(c.kind, c.pattern, c.tokens_per_weight) for c in plain}
        return sorted({t for kind, p, t in have if p == pattern and (kind, "dense", t) in have})

    def steps(self, tokens_per_weight: float) -> list[int]:
        """Optimizer steps of the plain runs of a length, ascending."""
        counts = (r.raw.get("steps") for r in self.select(tokens_per_weight=tokens_per_weight))
        return sorted({n for n in counts if isinstance(n, int)})

    def _pairs(
        self, kind: str, pattern: str, figure: str, **wanted: Any
    ) -> dict[int, tuple[float, float]]:
        here = {r.cell.seed: r for r in self.select(kind=kind, pattern=pattern, **wanted)}
        shared = {k: v for k, v in wanted.items() if k == "tokens_per_weight"}
        dense = {r.cell.seed: r for r in self.select(kind=kind, pattern="dense", **shared)}
        both = {
            s: (getattr(here[s], figure), getattr(dense[s], figure)) for s in here if s in dense
        }
        return {s: pair for s, pair in sorted(both.items()) if None not in pair}


def sizes(rows: Sequence[Row]) -> list[str]:
    """Sizes in the rows, the one with most rows first."""
    counts = Counter(row.cell.size for row in rows)
    return [size for size, _ in counts.most_common()]


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
