"""Values from files in messages: never long, never costly."""

import pytest

from sparse_bitnet.core import errors, shown
from sparse_bitnet.core.errors import LONGEST_MESSAGE, LONGEST_SHOWN, SparseBitNetError


@pytest.mark.parametrize("value", ["6:8", 7, 0.5, None, True, ["a", 1], {"a": 1}, (0.9, 0.95)])
def test_ordinary_values_are_their_repr(value):
    assert shown(value) == repr(value)


def bomb():
    value = ["x"] * 9
    for _ in range(30):
        value = [value] * 9  # written out, 9³¹ parts
    return value


def ring():
    value = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    "make",
    [
        lambda: "x" * 10**6,
        lambda: 1 << 10**6,
        lambda: list(range(10**6)),
        lambda: dict.fromkeys(range(10**6)),
        bomb,
        ring,
    ],
)
def test_long_ones_are_cut(make):
    assert len(shown(make())) <= LONGEST_SHOWN


KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, SparseBitNetError)
]


@pytest.mark.parametrize("kind", KINDS)
def test_messages_keep_the_place_and_the_remedy(kind):
    assert str(kind("short")) == "short"
    message = str(kind(f"tokenizer.json: {'x' * 100_000}; get the file again"))
    assert len(message) <= LONGEST_MESSAGE
    assert message.startswith("tokenizer.json: x") and message.endswith("; get the file again")
