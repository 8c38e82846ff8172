import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_bitnet.core import DENSE, Pattern, PatternError, WeightError, worst_group
from sparse_bitnet.formats import windows


def slow_encode(row: list[int], group: int) -> list[int]:
    """The rule word for word: left to right into the first window that covers and has room."""
    out: list[int] = []
    for start in range(0, len(row), group):
        boxes = [[0] * 4 for _ in range(group // 2 - 1)]
        for lane in range(group):
            if row[start + lane]:
                for window, box in enumerate(boxes):
                    offset = lane - 2 * window
                    if 0 <= offset < 4 and sum(v != 0 for v in box) < 2:
                        box[offset] = row[start + lane]
                        break
                else:
                    raise AssertionError("no window had room")
        out += [v for box in boxes for v in box]
    return out


@st.composite
def legal_rows(draw: st.DrawFn) -> tuple[list[int], int]:
    group = 2 * draw(st.integers(2, 16))
    row: list[int] = []
    for _ in range(draw(st.integers(1, 3))):
        part = draw(st.lists(st.sampled_from([-1, 1]), min_size=group, max_size=group))
        for lane in draw(
            st.lists(st.integers(0, group - 1), min_size=2, max_size=group, unique=True)
        ):
            part[lane] = 0
        row += part
    return row, group


@settings(deadline=None, max_examples=150)
@given(legal_rows())
def test_encode_equals_the_slow_loop_and_loses_nothing(case: tuple[list[int], int]) -> None:
    row, group = case
    ternary = torch.tensor([row], dtype=torch.int8)
    encoded = windows.encode(ternary, group)
    assert encoded.tolist() == [slow_encode(row, group)]
    assert worst_group(encoded, 4) <= 2
    assert torch.equal(windows.decode(encoded, group), ternary)
    x = torch.randint(-128, 128, (3, len(row)))
    assert torch.equal(windows.lift(x, group) @ encoded[0].long(), x @ ternary[0].long())


@pytest.mark.parametrize("group", [4, 6, 8])
def test_every_legal_group_fits(group: int) -> None:
    every = torch.cartesian_prod(*[torch.arange(-1, 2, dtype=torch.int8)] * group)
    legal = every[(every != 0).sum(-1) <= group - 2]
    encoded = windows.encode(legal, group)
    assert worst_group(encoded, 4) <= 2
    assert torch.equal(windows.decode(encoded, group), legal)


def test_a_group_that_breaks_the_pattern_is_an_error_not_a_drop() -> None:
    ternary = torch.zeros(3, 24, dtype=torch.int8)
    ternary[1, 8:15] = 1
    with pytest.raises(WeightError, match=r"row 1, lanes 8–15: 7 non-zeros .* at most 6 fit"):
        windows.encode(ternary, 8)


@pytest.mark.parametrize("group", [0, 2, 5, 7, 16])
def test_refuses_groups_that_are_none(group: int) -> None:
    with pytest.raises(PatternError, match=r"no .*group"):
        windows.encode(torch.zeros(1, 24, dtype=torch.int8), group)
    with pytest.raises(PatternError, match=r"no .*group"):
        windows.lift(torch.zeros(1, 24), group)


def test_decode_refuses_a_foreign_width() -> None:
    with pytest.raises(PatternError, match="no multiple of 12"):
        windows.decode(torch.zeros(1, 16, dtype=torch.int8), 8)


@pytest.mark.parametrize(
    ("name", "columns", "group"),
    [
        ("2:4", 64, 4),
        ("6:8", 64, 8),
        ("4:6", 66, 6),
        ("8:10", 1000, 10),
        ("4:8", 64, 8),
        ("7:8", 64, 16),
        ("7:8", 40, None),
        ("15:16", 64, 32),
        ("31:32", 64, None),
        ("30:32", 64, 32),
        ("1:2", 64, 4),
        ("2:3", 66, 6),
        ("5:7", 70, 14),
    ],
)
def test_group_for(name: str, columns: int, group: int | None) -> None:
    assert windows.group_for(Pattern.parse(name), columns) == group


def test_dense_has_no_group() -> None:
    assert windows.group_for(DENSE, 64) is None


def test_three_dimensions_and_empty() -> None:
    ternary = torch.ones(2, 3, 16, dtype=torch.int8)
    ternary[..., ::4] = 0
    encoded = windows.encode(ternary, 8)
    assert encoded.shape == (2, 3, 24)
    assert torch.equal(windows.decode(encoded, 8), ternary)
    assert windows.encode(torch.zeros(0, 16, dtype=torch.int8), 8).shape == (0, 24)
