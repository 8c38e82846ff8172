"""Each published claim, our figure beside it, and a verdict by a stated rule.

A claim is one or more comparisons, each a quantity that is above 0 if the claim is right, measured
per seed. One comparison

- is not decided if it has one seed and is smaller than the standard deviation over seeds of the
  runs that it is measured against, where those have several;
- holds if its mean is above 0, every seed is above 0, there are at least two seeds and the mean is
  more than two standard errors from 0;
- points the claimed way if only its mean is above 0;
- does not hold otherwise.

A claim is not decided if none of its comparisons is, holds if all of them hold and none that it
speaks of is missing, does not hold here if none points the claimed way, and holds in part in all
other cases. Runs that cannot tell (no model beyond a line, or both first beyond it at one pattern
with unmeasured ones before it) leave it not decided, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import published
from runs import KINDS, Estimate, Runs, dead_zone_groups, first_beyond, signed

RULE = (
    "Rule: a comparison holds if every one of at least two seeds shows it and the mean lies more "
    "than two standard errors from zero; it points the claimed way if only the mean does. One seed "
    "is not decided if it differs by less than the seeds of what it is compared with spread. A "
    "claim is not decided if none of its comparisons is or the measured patterns cannot tell. It "
    "holds if all of them hold and none is missing, does not hold here if none points the claimed "
    "way, and holds in part otherwise. ± is the standard deviation over seeds."
)
HOLDS, IN_PART, FAILS = "holds", "holds in part", "does not hold here"
NOT_DECIDED = "not decided"
NAME = {"bf16": "BF16", "bitnet": "BitNet"}
ZEROS_CLOSE = 0.05  # absolute distance from the published fraction that counts as the same


@dataclass(frozen=True)
class Claim:
    """A line of the table; ``missing`` says which cells would decide it when it has no verdict."""

    claim: str
    published: str
    ours: str
    verdict: str
    missing: str = ""


def verdict_of(
    comparisons: list[Estimate], baseline: Estimate | None = None, complete: bool = True
) -> str:
    """The rule at the top of this file.

    Args:
        baseline: the runs that all comparisons are measured against, in the same unit; None where
            there are none of several seeds.
        complete: these are all that the claim speaks of, and not only those that were measured.
    """
    return _verdict([_grade(one, baseline) for one in comparisons], complete)


def _verdict(grades: list[str], complete: bool = True) -> str:
    if all(grade == NOT_DECIDED for grade in grades):
        return NOT_DECIDED
    if complete and all(grade == HOLDS for grade in grades):
        return HOLDS
    return IN_PART if HOLDS in grades or IN_PART in grades else FAILS


def _grade(one: Estimate, baseline: Estimate | None = None) -> str:
    if baseline and len(one.values) == 1 < len(baseline.values) and abs(one.mean) < baseline.spread:
        return NOT_DECIDED
    if one.mean <= 0:
        return FAILS
    sure = len(one.values) > 1 and min(one.values) > 0 and one.mean > 2 * one.standard_error
    return HOLDS if sure else IN_PART


def _by_seed(gap: Estimate, *sides: Estimate) -> str:
    """The grade of a difference by seed, measured against the side that has more seeds."""
    return _grade(gap, max(sides, key=lambda side: len(side.values)))


def decided(gap: Estimate) -> int:
    """1 if the comparison holds by the rule, −1 if its opposite does, 0 if neither."""
    opposite = Estimate(tuple(-value for value in gap.values))
    return (_grade(gap) == HOLDS) - (_grade(opposite) == HOLDS)


def claims(runs: Runs) -> list[Claim]:
    """The claims about one size, by the rule."""
    makers: list[Callable[[Runs], Claim]] = [
        _delta,
        _every_pattern,
        _collapse,
        _accuracy,
        _zeros,
        _dead_zone,
        _ablations,
        _dense_to_sparse,
    ]
    return [maker(runs) for maker in makers]


def _undecided(claim: str, theirs: str, missing: str) -> Claim:
    return Claim(claim, theirs, "–", "not measured", missing)


def _delta(runs: Runs) -> Claim:
    claim = "At 6:8 BitNet loses less perplexity than BF16, each against its own dense model"
    theirs = ", ".join(
        f"{size}: {signed(published.DELTA_PPL_6_8['bf16'][size])} BF16, "
        f"{signed(published.DELTA_PPL_6_8['bitnet'][size])} BitNet"
        for size in published.DELTA_PPL_6_8["bf16"]
    )
    bf16, bitnet = runs.delta("bf16", "6:8"), runs.delta("bitnet", "6:8")
    gap = runs.advantage("6:8", "difference")
    if bf16 is None or bitnet is None or gap is None:
        return _undecided(claim, theirs, "bf16 and bitnet at dense and 6:8")
    ours = f"{bf16.text(2, True)} BF16, {bitnet.text(2, True)} BitNet"
    return Claim(claim, theirs, ours, _by_seed(gap, bf16, bitnet))


def _every_pattern(runs: Runs) -> Claim:
    claim = "BitNet's normalised perplexity is below BF16's at every pattern N:8"
    theirs = ", ".join(
        f"{pattern}: {value:.2f} | {published.NORMALISED_PPL['bitnet'][pattern]:.2f}"
        for pattern, value in published.NORMALISED_PPL["bf16"].items()
    )
    found = {p: runs.advantage(p) for p in published.NORMALISED_PPL["bf16"]}
    gaps = {p: gap for p, gap in found.items() if gap is not None}
    if len(gaps) < 2:
        return _undecided(claim, f"{theirs} (BF16 | BitNet)", "bf16 and bitnet at the patterns N:8")
    parts, grades = [], []
    for p, gap in gaps.items():
        bf16, bitnet = runs.ratio("bf16", p), runs.ratio("bitnet", p)
        assert bf16 is not None and bitnet is not None  # their difference exists
        parts.append(f"{p}: {bf16.mean:.3f} | {bitnet.mean:.3f}")
        grades.append(_by_seed(gap, bf16, bitnet))
    ours = f"{', '.join(parts)} (BF16 | BitNet)"
    verdict = _verdict(grades, complete=len(gaps) == len(found))
    return Claim(claim, f"{theirs} (BF16 | BitNet)", ours, verdict)


def _collapse(runs: Runs) -> Claim:
    line = published.COLLAPSE_AT - 1
    claim = f"BitNet stays within +{line:.0%} perplexity at a sparser pattern than BF16"
    first = published.FIRST_BEYOND
    theirs = f"first beyond: {first['bf16']} BF16, {first['bitnet']} BitNet"
    ratios: dict[str, dict[str, Estimate]] = {}
    for kind in KINDS:
        found = {p: runs.ratio(kind, p) for p in published.NORMALISED_PPL[kind]}
        ratios[kind] = {p: ratio for p, ratio in found.items() if ratio is not None}
    shared = [p for p in ratios["bf16"] if p in ratios["bitnet"]]
    if len(shared) < 2:
        return _undecided(claim, theirs, "bf16 and bitnet at the patterns N:8")
    means = {k: {p: ratios[k][p].mean for p in shared} for k in ratios}
    beyond = {k: first_beyond(means[k], published.COLLAPSE_AT) for k in means}
    names = {k: v or f"none down to {shared[-1]}" for k, v in beyond.items()}
    ours = f"first beyond: {names['bf16']} BF16, {names['bitnet']} BitNet"
    if beyond["bf16"] == beyond["bitnet"] and _blind(beyond["bf16"], shared):
        return Claim(claim, theirs, ours, NOT_DECIDED)
    # BF16 above the line and BitNet below it, at the pattern where BF16 first crosses.
    pattern = beyond["bf16"] or shared[-1]
    above = Estimate(tuple(v - published.COLLAPSE_AT for v in ratios["bf16"][pattern].values))
    below = Estimate(tuple(published.COLLAPSE_AT - v for v in ratios["bitnet"][pattern].values))
    return Claim(claim, theirs, ours, _both(above, below))


def _blind(first: str | None, measured: Sequence[str]) -> bool:
    """Whether kinds that are first beyond the line at one pattern may still differ.

    They may if neither is beyond it anywhere, or at a pattern next before that was not measured.
    """
    every = list(published.NORMALISED_PPL["bf16"])
    return first is None or (first != every[0] and every[every.index(first) - 1] not in measured)


def _both(above: Estimate, below: Estimate) -> str:
    """Two conditions that must hold at once: if either fails, so does the claim."""
    return FAILS if above.mean <= 0 or below.mean <= 0 else verdict_of([above, below])


def _accuracy(runs: Runs) -> Claim:
    claim = "At 6:8 BitNet loses less downstream accuracy than BF16 (ours: cloze, in points)"
    theirs = ", ".join(
        f"{size}: {signed(published.DELTA_ACCURACY_6_8['bf16'][size])} BF16, "
        f"{signed(published.DELTA_ACCURACY_6_8['bitnet'][size])} BitNet"
        for size in published.DELTA_ACCURACY_6_8["bf16"]
    )
    deltas = {kind: runs.deltas(kind, "6:8", "accuracy") for kind in KINDS}
    both = sorted(deltas["bf16"].keys() & deltas["bitnet"].keys())
    if not both:
        return _undecided(claim, theirs, "bf16 and bitnet at dense and 6:8, with cloze questions")
    gap = Estimate(tuple(deltas["bitnet"][seed] - deltas["bf16"][seed] for seed in both))
    bf16, bitnet = (Estimate(tuple(found.values())) for found in deltas.values())
    points = [Estimate(tuple(100 * v for v in one.values)) for one in (bf16, bitnet)]
    ours = f"{points[0].text(2, True)} BF16, {points[1].text(2, True)} BitNet"
    return Claim(claim, theirs, ours, _by_seed(gap, bf16, bitnet))


def _zeros(runs: Runs) -> Claim:
    claim = "Ternary weights trained with 6:8 are near half zeros before any mask"
    theirs = f"about {published.ZEROS_BEFORE_MASK:.0%}"
    found = [row.zeros for row in runs.select(kind="bitnet", pattern="6:8")]
    values = tuple(value for value in found if value is not None)
    if not values:
        return _undecided(claim, theirs, "bitnet at 6:8")
    distances = [abs(value - published.ZEROS_BEFORE_MASK) for value in values]
    within = [Estimate(tuple(k * ZEROS_CLOSE - d for d in distances)) for k in (1, 2)]
    points = round(100 * ZEROS_CLOSE)
    claim += f" (within {points} points of the published; in part: within {2 * points})"
    ours = Estimate(tuple(100 * v for v in values)).text(1) + " %"
    return Claim(claim, theirs, ours, verdict_of(within))


def _dead_zone(runs: Runs) -> Claim:
    claim = "The pruning threshold falls into the dead zone for more groups of BitNet than of BF16"
    theirs = "shown in histograms, no figure"
    pattern = "6:8"
    shares = {
        kind: {r.cell.seed: dead_zone_groups(r) for r in runs.select(kind=kind, pattern=pattern)}
        for kind in KINDS
    }
    both = sorted(shares["bf16"].keys() & shares["bitnet"].keys())
    if not both:
        return _undecided(claim, theirs, f"bf16 and bitnet at {pattern}")
    gap = Estimate(tuple(shares["bitnet"][s] - shares["bf16"][s] for s in both))
    bf16, bitnet = (Estimate(tuple(found.values())) for found in shares.values())
    points = [Estimate(tuple(100 * v for v in one.values)).text(1) for one in (bf16, bitnet)]
    ours = f"{points[0]} % BF16, {points[1]} % BitNet, at {pattern}"
    return Claim(claim, theirs, ours, _by_seed(gap, bf16, bitnet))


def _ablations(runs: Runs) -> Claim:
    claim = "At 6:8 each ablation is worse than the published method"
    base = published.ABLATIONS_PPL["published"]
    theirs = ", ".join(
        f"{name}: {'worse' if value is None else signed(value - (base or 0))}"
        for name, value in published.ABLATIONS_PPL.items()
        if name != "published"
    )
    plain = {"kind": "bitnet", "pattern": "6:8"}
    found = {
        name: runs.excess(plain, **plain, method=name)
        for name in published.ABLATIONS_PPL
        if name != "published"
    }
    gaps = {name: gap for name, gap in found.items() if gap is not None}
    if not gaps:
        return _undecided(claim, theirs, "bitnet at 6:8 with each ablation")
    ours = ", ".join(f"{name}: {gap.text(2, True)}" for name, gap in gaps.items())
    verdict = verdict_of(list(gaps.values()), runs.perplexity(**plain), len(gaps) == len(found))
    return Claim(claim, theirs, ours, verdict)


def _dense_to_sparse(runs: Runs) -> Claim:
    claim = "Dense first, then 6:8, ends worse than sparse from scratch"
    scratch = published.DENSE_TO_SPARSE_PPL["sparse from scratch"]
    switched = published.DENSE_TO_SPARSE_PPL["switched"]
    assert isinstance(switched, tuple) and isinstance(scratch, float)
    theirs = ", ".join(signed(value - scratch) for value in switched)
    schedules = sorted(
        {
            row.cell.until
            for row in runs.rows
            if len(row.cell.until) == 1 and row.cell.until[0][1] == "dense"
        }
    )
    plain = {"kind": "bitnet", "pattern": "6:8"}
    found = {until: runs.excess(plain, **plain, until=until) for until in schedules}
    gaps = {until: gap for until, gap in found.items() if gap is not None}
    if not gaps:
        return _undecided(claim, theirs, "bitnet at 6:8, dense to 25, 50 and 75 % of training")
    ours = ", ".join(f"{until[0][0]:.0%}: {gap.text(2, True)}" for until, gap in gaps.items())
    verdict = verdict_of(list(gaps.values()), runs.perplexity(**plain))
    return Claim(claim, theirs, ours, verdict)


def claim_about_size(by_size: Sequence[Runs]) -> Claim:
    """The claim that needs several sizes, trained equally long: longer training costs more.

    The training length is the one that most sizes have.
    """
    claim = "ΔPPL at 6:8 falls with size, for both kinds"
    theirs = "; ".join(
        f"{NAME[kind]}: " + " → ".join(signed(v) for v in values.values())
        for kind, values in published.DELTA_PPL_6_8.items()
    )
    lengths = Counter(one.main_length for one in by_size if one.main_length > 0)  # NaN: no grid
    length = max(lengths, key=lambda n: (lengths[n], n), default=None)
    alike = [one for one in by_size if one.main_length == length]
    ordered = sorted(alike, key=lambda one: one.weights)
    grades, parts = [], []
    for kind in KINDS:
        found = {one.label: deltas for one in ordered if (deltas := one.deltas(kind, "6:8"))}
        if len(found) < 2:
            missing = "dense and 6:8 of both kinds at a second size, trained equally long"
            return _undecided(claim, theirs, missing)
        estimates = [Estimate(tuple(deltas.values())) for deltas in found.values()]
        texts = " → ".join(one.text(2, True) for one in estimates)
        parts.append(f"{NAME[kind]}, {' → '.join(found)}: {texts}")
        for (small, large), sides in zip(
            pairwise(found.values()), pairwise(estimates), strict=True
        ):
            both = sorted(small.keys() & large.keys())
            if not both:
                return _undecided(claim, theirs, f"two sizes of one seed, {NAME[kind]}")
            gap = Estimate(tuple(small[seed] - large[seed] for seed in both))
            grades.append(_by_seed(gap, *sides))
    return Claim(claim, theirs, "; ".join(parts), _verdict(grades))
