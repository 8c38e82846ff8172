"""Rates and patterns as functions of the step."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_bitnet.core import DENSE, ConfigError, Pattern
from sparse_bitnet.train.config import QuantizationConfig, ScheduleConfig, SparsityConfig
from sparse_bitnet.train.schedule import (
    learning_rate,
    pattern_at,
    quantization_at,
    weight_decay,
)


def test_learning_rate_rises_then_falls():
    schedule = ScheduleConfig(steps=100, warmup=0.1, final=0.2)
    rates = [learning_rate(step, schedule, 1.0) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(rates) == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[99] == pytest.approx(0.2)
    middle = 10 + 89 / 2  # half of the cosine: half-way between peak and end
    assert (rates[math.floor(middle)] + rates[math.ceil(middle)]) / 2 == pytest.approx(0.6)


@settings(deadline=None, max_examples=50)
@given(
    steps=st.integers(1, 50),
    warmup=st.floats(0, 1),
    final=st.floats(0, 1),
)
def test_learning_rate_stays_in_bounds(steps, warmup, final):
    schedule = ScheduleConfig(steps=steps, warmup=warmup, final=final)
    for step in range(steps):
        assert 0 <= learning_rate(step, schedule, 2.0) <= 2.0
    if round(warmup * steps) < steps - 1:
        assert learning_rate(steps - 1, schedule, 2.0) == pytest.approx(2.0 * final)


def test_weight_decay_falls_to_zero_at_half_for_bitnet_only():
    schedule = ScheduleConfig(steps=100)
    decays = [weight_decay(step, schedule, 0.1, "bitnet") for step in range(100)]
    assert decays[0] == 0.1
    assert decays[25] == pytest.approx(0.05)
    assert decays[50:] == [0.0] * 50
    assert weight_decay(99, schedule, 0.1, "bf16") == 0.1
    constant = ScheduleConfig(steps=100, weight_decay="constant")
    assert weight_decay(99, constant, 0.1, "bitnet") == 0.1
    to_the_end = ScheduleConfig(steps=100, weight_decay="cosine", weight_decay_until=1.0)
    assert weight_decay(50, to_the_end, 0.1, "bf16") == pytest.approx(0.05)


def test_patterns_by_step():
    def run(until):
        sparsity = SparsityConfig(pattern="4:8", until=until)
        return [pattern_at(step, 10, sparsity) for step in range(10)]

    four, six = Pattern(4, 8), Pattern(6, 8)
    assert run({}) == [four] * 10
    assert run({0.5: "dense"}) == [DENSE] * 5 + [four] * 5
    # The order in which a recipe names them does not matter.
    staircase = run({0.66: "6:8", 0.33: "8:8"})
    assert [p.is_dense for p in staircase] == [True] * 4 + [False] * 6
    assert staircase[4:] == [six] * 3 + [four] * 3
    assert run({0.01: "dense"})[0].is_dense


@pytest.mark.parametrize("shape", ["linear", "sigmoid"])
@pytest.mark.parametrize("until", [0.0, 0.01, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 40])
def test_quantization_rises_to_one_and_is_there_at_the_end(shape, until, steps):
    blend = QuantizationConfig(until, shape)
    parts = [quantization_at(step, steps, blend)[0] for step in range(steps)]
    assert parts == sorted(parts)
    assert parts[0] > 0
    assert parts[-1] == 1.0
    below = sum(part < 1 for part in parts)
    assert below == max(0, round(until * steps) - 1)


def test_quantization_by_step():
    linear = [quantization_at(step, 8, QuantizationConfig(0.5))[0] for step in range(8)]
    assert linear == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    shape = QuantizationConfig(0.5, "sigmoid")
    sigmoid = [quantization_at(step, 8, shape)[0] for step in range(8)]
    logistic = [1 / (1 + math.exp(-10 * (x - 0.5))) for x in (0.0, 0.25, 0.5, 0.75)]
    low = logistic[0]
    expected = [(value - low) / (1 - 2 * low) for value in logistic[1:]]
    assert sigmoid == pytest.approx([*expected, 1, 1, 1, 1, 1])


def test_layers_one_after_the_other():
    blend = QuantizationConfig(0.25, begin={"a": 0.5, "b": 0.75})
    parts = [quantization_at(step, 8, blend) for step in range(8)]
    assert [part for part, _ in parts] == [0.5, 1, 1, 1, 1, 1, 1, 1]
    assert [by_rule["a"] for _, by_rule in parts] == [0, 0, 0, 0, 0.5, 1, 1, 1]
    assert [by_rule["b"] for _, by_rule in parts] == [0, 0, 0, 0, 0, 0, 0.5, 1]
    at_once = QuantizationConfig(begin={"a": 0.5})
    assert [quantization_at(step, 4, at_once)[1]["a"] for step in range(4)] == [0, 0, 1, 1]
    few = QuantizationConfig(0.4, begin={"a": 0.6})
    assert all(quantization_at(n - 1, n, few)[1]["a"] == 1 for n in range(1, 20))


@pytest.mark.parametrize("begin", [-0.1, 0.8])
def test_a_beginning_that_leaves_no_time(begin):
    with pytest.raises(ConfigError, match=r"begin of x is .*: at least 0, at most 1 − until"):
        QuantizationConfig(0.3, begin={"x": begin})
