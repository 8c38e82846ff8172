"""Learning rate, weight decay, pattern and quantization as pure functions of the step.

``step`` counts from 0: the values are those that step number ``step`` is taken with.
"""

from __future__ import annotations

import math

from sparse_bitnet.core import Pattern
from sparse_bitnet.train.config import QuantizationConfig, ScheduleConfig, SparsityConfig

STEEPNESS = 5.0  # of the sigmoid: it begins and ends at 2.7 % of its steepest slope


def learning_rate(step: int, schedule: ScheduleConfig, peak: float) -> float:
    """Linear warm-up to ``peak``, then a cosine down to ``schedule.final`` of it.

    The first step has a rate above 0 and the last one exactly ``final * peak``.
    """
    warmup = round(schedule.warmup * schedule.steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, schedule.steps - 1 - warmup)
    cosine = (1 + math.cos(math.pi * min(1.0, done))) / 2
    return peak * (schedule.final + (1 - schedule.final) * cosine)


def weight_decay(step: int, schedule: ScheduleConfig, initial: float, kind: str) -> float:
    """Constant, or a cosine from ``initial`` down to 0 at ``weight_decay_until`` of training.

    ``auto`` is what the code published with arXiv 2603.05168 does: falling to 0 at half of training
    for BitNet, so that ternary weights settle in the second half; constant for the BF16 baseline.
    """
    shape = schedule.weight_decay
    if shape == "constant" or (shape == "auto" and kind == "bf16"):
        return initial
    done = step / (schedule.weight_decay_until * schedule.steps)
    return initial * (1 + math.cos(math.pi * min(1.0, done))) / 2


def pattern_at(step: int, steps: int, sparsity: SparsityConfig) -> Pattern:
    """The pattern in force: that of the first ``until`` not yet passed, at the end ``pattern``."""
    for fraction in sorted(sparsity.until):
        if step < fraction * steps:
            return Pattern.parse(sparsity.until[fraction])
    return Pattern.parse(sparsity.pattern)


def quantization_at(
    step: int, steps: int, quantization: QuantizationConfig
) -> tuple[float, dict[str, float]]:
    """λ, and that of the modules that a rule of ``begin`` names, by rule.

    λ is above 0 in the first step, 1 from ``until`` on and always in the last; that of a rule is 0
    until it begins.
    """
    by_rule = {
        rule: _part(step - round(begin * steps), steps, quantization)
        for rule, begin in quantization.begin.items()
    }
    if step == steps - 1:  # where steps are few, a rounding could leave one behind
        by_rule = dict.fromkeys(by_rule, 1.0)
    return _part(step, steps, quantization), by_rule


def _part(step: int, steps: int, quantization: QuantizationConfig) -> float:
    """λ, steps after it began to rise.

    The sigmoid is a logistic curve, steepest at half the way, stretched to pass from 0 to 1.
    """
    done = max(0.0, min(1.0, (step + 1) / max(1, round(quantization.until * steps))))
    if quantization.shape == "linear":
        return done
    return (1 + math.tanh(STEEPNESS * (done - 0.5)) / math.tanh(STEEPNESS / 2)) / 2
