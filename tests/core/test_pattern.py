"""Patterns: what is read, what is refused, and what a refusal says."""

import pytest

from sparse_bitnet.core import DENSE, Pattern, PatternError


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 2), (2, 4), (6, 8), (31, 32), (32, 32)])
def test_reads_what_it_writes(n, m):
    pattern = Pattern(n, m)
    assert Pattern.parse(f"{n}:{m}") == pattern
    assert Pattern.parse(pattern) is pattern
    assert pattern.is_dense == (n == m)
    assert str(pattern) == ("dense" if n == m else f"{n}:{m}")
    assert pattern.density == n / m


def test_dense_is_one_of_one():
    assert Pattern.parse("dense") == DENSE
    assert DENSE.is_dense


@pytest.mark.parametrize(
    "text", ["", "6", "6:", ":8", "6/8", "6:8 ", " 6:8", "6:8:1", "-6:8", "+6:8", "six", "Dense"]
)
def test_refuses_other_text(text):
    with pytest.raises(PatternError, match="not understood: write N:M as in 6:8, or dense"):
        Pattern.parse(text)


@pytest.mark.parametrize("text", ["0:8", "9:8", "0:0", "8:33", "33:33", "999:999"])
def test_refuses_numbers_out_of_range(text):
    with pytest.raises(PatternError, match=r"1 <= N <= M <= 32, for example 6:8"):
        Pattern.parse(text)


def test_refuses_numbers_that_are_not_whole():
    with pytest.raises(PatternError, match="whole numbers"):
        Pattern(1.5, 2)


def test_explains_yaml_base_sixty():
    """YAML reads an unquoted 6:8 as 6 · 60 + 8."""
    with pytest.raises(PatternError, match=r'368 is not text: write "6:8" with quotes'):
        Pattern.parse(6 * 60 + 8)


def test_division_names_place_length_and_remedy():
    Pattern.parse("6:8").check_divides(16)
    DENSE.check_divides(7)
    Pattern(8, 8).check_divides(7)  # dense, whatever M
    with pytest.raises(PatternError) as error:
        Pattern.parse("6:8").check_divides(20, "layers.0.q_proj.weight (4, 20)")
    message = str(error.value)
    assert "layers.0.q_proj.weight (4, 20): in_features 20 is not a multiple of M = 8" in message
    assert "group size among [2, 4]" in message
    with pytest.raises(PatternError, match="; use a rule that gives this module another pattern"):
        Pattern.parse("6:8").check_divides(7)
