"""N:M sparsity patterns: at most N non-zeros in every M consecutive weights of a row."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sparse_bitnet.core.errors import PatternError, shown

LARGEST_GROUP = 32


@dataclass(frozen=True)
class Pattern:
    """``n`` weights kept of every ``m``, with 1 ≤ n ≤ m ≤ 32. ``n == m`` is dense.

    Raises:
        PatternError: if the numbers are out of range.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        whole = isinstance(self.n, int) and isinstance(self.m, int)
        if not whole or not 1 <= self.n <= self.m <= LARGEST_GROUP:
            raise PatternError(
                f"pattern {self.n}:{self.m} is out of range: N:M needs whole numbers, "
                f"1 <= N <= M <= {LARGEST_GROUP}, for example 6:8"
            )

    @classmethod
    def parse(cls, text: str | Pattern) -> Pattern:
        """Read ``"6:8"`` or ``"dense"``.

        Raises:
            PatternError: if the text is neither. YAML reads an unquoted 6:8 as the number 368
                (six minutes, eight seconds), so a number gets that hint.
        """
        if isinstance(text, Pattern):
            return text
        if not isinstance(text, str):
            raise PatternError(
                f'pattern {shown(text)} is not text: write "6:8" with quotes (in YAML, too, where '
                "6:8 without them is a number in base 60)"
            )
        if text == "dense":
            return DENSE
        match = re.fullmatch(r"(\d{1,3}):(\d{1,3})", text)
        if not match:
            raise PatternError(
                f"pattern {shown(text)} is not understood: write N:M as in 6:8, or dense"
            )
        return cls(int(match[1]), int(match[2]))

    @property
    def is_dense(self) -> bool:
        return self.n == self.m

    @property
    def density(self) -> float:
        """The largest fraction of weights that may be non-zero."""
        return self.n / self.m

    def __str__(self) -> str:
        return "dense" if self.is_dense else f"{self.n}:{self.m}"

    def check_divides(self, in_features: int, where: str = "weight") -> None:
        """Refuse a row length that M does not divide.

        Raises:
            PatternError: naming ``where``, the length and the remedy.
        """
        if not self.is_dense and in_features % self.m:
            divisors = [m for m in (2, 4, 8, 16, 32) if in_features % m == 0]
            remedy = f"use a group size among {divisors}, or a rule" if divisors else "use a rule"
            raise PatternError(
                f"{where}: in_features {in_features} is not a multiple of M = {self.m} of pattern "
                f"{self}; {remedy} that gives this module another pattern or skips it"
            )


DENSE = Pattern(1, 1)
