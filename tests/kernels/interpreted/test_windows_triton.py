import pytest
import torch

from sparse_bitnet.core import Pattern, ternarize
from sparse_bitnet.formats.windows import encode, group_for
from sparse_bitnet.kernels.quantize_activations import reference
from sparse_bitnet.kernels.quantize_activations import triton as quantization
from sparse_bitnet.kernels.ternarize import triton_windows


@pytest.mark.parametrize("pattern", ["6:8", "4:6", "8:10", "7:8", "14:16", "2:4", "4:8", "1:8"])
@pytest.mark.parametrize("groups", [1, 3, 70])
def test_encode(pattern: str, groups: int) -> None:
    parsed = Pattern.parse(pattern)
    columns = groups * parsed.m * 2
    ternary, _ = ternarize(torch.randn(5, columns), parsed)
    group = group_for(parsed, columns)
    assert group is not None
    assert torch.equal(triton_windows.encode(ternary, group), encode(ternary, group))


def test_encode_every_full_group() -> None:
    """All ways to leave out two of eight, with both signs."""
    rows = []
    for first in range(8):
        for second in range(first + 1, 8):
            row = torch.tensor([1, -1, 1, 1, -1, -1, 1, -1], dtype=torch.int8)
            row[[first, second]] = 0
            rows.append(row)
    ternary = torch.stack(rows)
    assert torch.equal(triton_windows.encode(ternary, 8), encode(ternary, 8))


def test_encode_nothing() -> None:
    assert triton_windows.encode(torch.zeros(0, 8, dtype=torch.int8), 8).shape == (0, 12)


@pytest.mark.parametrize(
    ("columns", "group"), [(64, 8), (96, 6), (1000, 8), (1200, 10), (2064, 16)]
)
def test_both_forms_of_the_activations(columns: int, group: int) -> None:
    x = torch.randn(3, columns)
    plain = torch.full((3, columns), 99, dtype=torch.int8)
    lifted, scale = quantization.quantize(x, group=group, plain=plain)
    expected, expected_scale = reference.quantize_fused(x)
    assert torch.equal(plain, expected)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(lifted, reference.quantize_fused(x, group=group)[0])
