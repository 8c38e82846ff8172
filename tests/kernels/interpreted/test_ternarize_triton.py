import pytest
import torch

from sparse_bitnet.core import DENSE, Pattern, ternarize
from sparse_bitnet.kernels.ternarize import triton, triton_select

PATTERNS = [
    "dense",
    "1:2",
    "2:4",
    "1:4",
    "6:8",
    "3:8",
    "7:16",
    "4:6",
    "8:10",
    "5:7",
    "3:31",
    "9:32",
]


@pytest.mark.parametrize("name", PATTERNS)
def test_equals_reference(name: str) -> None:
    pattern = Pattern.parse(name)
    weight = torch.randn(3, 3 * max(pattern.m, 8) if pattern.m != 7 else 49) * 0.02
    for version in (weight, (weight * 100).round() / 100):  # the second is full of ties
        ternary, scale = triton.ternarize(version, pattern)
        expected, gamma = ternarize(version, pattern)
        assert torch.equal(ternary, expected)
        assert torch.equal(scale, gamma)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["1:16", "9:10", "31:32"])
def test_ties_in_large_groups(name: str, dtype: torch.dtype) -> None:
    """Groups larger than those that are ranked, with ties across, above and below the N-th."""
    pattern = Pattern.parse(name)
    levels = torch.randint(-3, 4, (4, 2 * pattern.m)) * 0.25
    levels[0] = 0.5  # nothing but ties
    levels[1] = 0.0
    levels[2] = torch.finfo(dtype).tiny / 4 * levels[3].sign()  # subnormal
    weight = levels.to(dtype)
    ternary, scale = triton.ternarize(weight, pattern)
    expected, gamma = ternarize(weight, pattern)
    assert torch.equal(ternary, expected)
    assert torch.equal(scale, gamma)


@pytest.mark.parametrize("m", [1, 2, 3, 8, 9, 12])
def test_network_of_zeros_and_ones(m: int) -> None:
    """A comparator network orders everything if it orders all zeros and ones (Knuth, 5.3.4)."""
    for n in range(1, m + 1):
        high, low = triton_select.network(n, m)
        for bits in range(2**m):
            values = [bits >> i & 1 for i in range(m)]
            for a, b in zip(high, low, strict=True):
                values[a], values[b] = max(values[a], values[b]), min(values[a], values[b])
            assert values[n - 1] == (n <= bits.bit_count())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_experts_and_segments(dtype: torch.dtype) -> None:
    weight = (torch.randn(2, 5, 40) * torch.tensor([1.0, 0.1]).view(2, 1, 1)).to(dtype)
    for shard_sizes in ((), (3, 2), (1, 3, 1)):
        ternary, scale = triton.ternarize(weight, Pattern(6, 8), shard_sizes)
        expected, gamma = ternarize(weight, Pattern(6, 8), None, shard_sizes)
        assert torch.equal(ternary, expected)
        assert torch.equal(scale, gamma)


def test_rounds_at_half_gamma_as_division_does() -> None:
    # Weights around γ/2, one float apart, for many γ: the kernel compares, the reference divides.
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        gamma = torch.rand(1, generator=generator) * 10 ** torch.randint(-4, 4, (1,)).float()
        half = gamma / 2
        above = torch.nextafter(half, half * 2)
        below = torch.nextafter(half, half * 0)
        # Two weights that restore the mean: γ·8 in all.
        near = torch.stack([half, above, below, -half, -above, -below]).flatten()
        rest = (gamma.double() * 8 - near.abs().double().sum()).float() / 2
        weight = torch.cat([near, rest, rest]).view(1, 8)
        expected, expected_scale = ternarize(weight, DENSE)
        ternary, scale = triton.ternarize(weight, DENSE)
        assert torch.equal(scale, expected_scale)
        assert torch.equal(ternary, expected)


def test_one_row_one_group_zero_weight_and_empty() -> None:
    for weight in (torch.randn(1, 8), torch.zeros(3, 16), torch.empty(0, 8), torch.randn(1, 1)):
        pattern = Pattern(6, 8) if weight.shape[-1] % 8 == 0 else DENSE
        ternary, scale = triton.ternarize(weight, pattern)
        assert ternary.shape == weight.shape
        if weight.numel():
            expected, gamma = ternarize(weight, pattern)
            assert torch.equal(ternary, expected)
            assert torch.equal(scale, gamma)


def test_strided_weight() -> None:
    weight = torch.randn(8, 6).t()
    assert torch.equal(
        triton.ternarize(weight, Pattern(2, 4))[0], ternarize(weight, Pattern(2, 4))[0]
    )


def test_the_last_group_of_a_row_does_not_see_the_next_row() -> None:
    weight = torch.full((2, 8), 0.5)
    weight[1] = 100.0
    ternary, _ = triton.ternarize(weight, Pattern(6, 8), (1, 1))
    assert ternary.tolist() == [[1, 1, 1, 1, 1, 1, 0, 0]] * 2
