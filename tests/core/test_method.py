"""The ablations' switches refuse what was never published."""

import pytest

from sparse_bitnet.core import ConfigError, Method


def test_default_is_the_published_method():
    assert Method() == Method("quant-then-mask", "master", "dense", 8)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("order", "mask"),
        ("mask_source", "ternary"),
        ("gradient", None),
        ("activation_bits", 2),
        ("activation_bits", "8"),
        ("activation_bits", [8]),
    ],
)
def test_refuses_unknown_values(field, value):
    with pytest.raises(ConfigError, match=rf"method\.{field} is .*; choose among"):
        Method(**{field: value})


def test_refuses_a_contradiction():
    with pytest.raises(ConfigError, match="mask_source must be 'master'"):
        Method(order="mask-then-quant", mask_source="quantized")
