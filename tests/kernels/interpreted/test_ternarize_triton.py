import importlib
import math

import pytest
import torch

from sparse_bitnet.core import DENSE, Method, Pattern, ternarize, ternarize_with
from sparse_bitnet.formats import two_bit
from sparse_bitnet.kernels.ternarize import triton, triton_select

kernels = importlib.import_module("sparse_bitnet.kernels.ternarize")  # a function has its name

PATTERNS = ["dense", "2:4", "6:8", "7:16", "5:7", "9:32"]


def derived(weight, pattern, shard_sizes=(), scale=None):
    """What the kernel makes, as int8, in memory that it has to fill."""
    packed, scale = triton.ternarize(weight.contiguous(), pattern, shard_sizes, scale)
    assert not (packed & packed >> 1 & two_bit.LOW_BITS).any()  # the code 3 is not used
    return two_bit.unpack_rows(packed, weight.shape[-1]), scale


@pytest.mark.parametrize("name", PATTERNS)
def test_equals_reference(name):
    pattern = Pattern.parse(name)
    columns = 2 * math.lcm(max(pattern.m, 4), 4)
    assert triton.serves(pattern, columns)
    weight = torch.randn(4, columns) * 0.02
    weight[2:] = (weight[2:] * 100).round() / 100  # full of ties
    expected, gamma = ternarize(weight, pattern)
    ternary, scale = derived(weight, pattern)
    assert torch.equal(ternary, expected)
    assert torch.equal(scale, gamma)


def test_what_it_does_not_serve():
    """Rows that do not fill their bytes, and groups that do not fit a thread."""
    assert not triton.serves(DENSE, 6)
    assert not triton.serves(Pattern(5, 7), 49)
    assert not triton.serves(Pattern(3, 31), 31 * 4)


def test_sums_of_many_pieces():
    weight = torch.randn(5, 2048)
    sums, counts = triton.scale_sums(weight, (2, 3))
    assert sums.shape == (2, 4)
    assert torch.equal(counts.sum(-1), torch.tensor([2.0, 3.0], dtype=torch.float64) * 2048)
    for part, rows in zip(sums, weight.split((2, 3)), strict=True):
        torch.testing.assert_close(part.sum(), rows.double().abs().sum(), rtol=1e-14, atol=0)
    assert torch.equal(derived(weight, DENSE, (2, 3))[1], ternarize(weight, DENSE, None, (2, 3))[1])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("1:16", torch.float16), ("9:10", torch.float32), ("31:32", torch.bfloat16)],
)
def test_ties_in_large_groups(name, dtype):
    """Groups larger than those that are ranked, with ties across, above and below the N-th."""
    pattern = Pattern.parse(name)
    levels = torch.randint(-3, 4, (4, 2 * pattern.m)) * 0.25
    levels[0] = 0.5  # nothing but ties
    levels[1] = 0.0
    levels[2] = torch.finfo(dtype).tiny / 4 * levels[3].sign()  # subnormal
    weight = levels.to(dtype)
    ternary, scale = derived(weight, pattern)
    expected, gamma = ternarize(weight, pattern)
    assert torch.equal(ternary, expected)
    assert torch.equal(scale, gamma)


@pytest.mark.parametrize("m", [1, 2, 3, 8, 9])
def test_network_of_zeros_and_ones(m):
    """A comparator network orders everything if it orders all zeros and ones (Knuth, 5.3.4)."""
    for n in range(1, m + 1):
        high, low = triton_select.network(n, m)
        for bits in range(2**m):
            values = [bits >> i & 1 for i in range(m)]
            for a, b in zip(high, low, strict=True):
                values[a], values[b] = max(values[a], values[b]), min(values[a], values[b])
            assert values[n - 1] == (n <= bits.bit_count())


@pytest.mark.parametrize(
    ("dtype", "shard_sizes"),
    [(torch.float32, (3, 2)), (torch.float16, ()), (torch.bfloat16, (1, 3, 1))],
)
def test_experts_and_fused_shards(dtype, shard_sizes):
    weight = (torch.randn(2, 5, 16) * torch.tensor([1.0, 0.1]).view(2, 1, 1)).to(dtype)
    ternary, scale = derived(weight, Pattern(6, 8), shard_sizes)
    expected, gamma = ternarize(weight, Pattern(6, 8), None, shard_sizes)
    assert torch.equal(ternary, expected)
    assert torch.equal(scale, gamma)


def test_rounds_at_half_gamma_as_division_does():
    # Weights around γ/2, one float apart, for many γ: the kernel compares, the reference divides.
    rows = []
    for _ in range(20):
        half = torch.rand(1) * 10 ** torch.randint(-4, 4, (1,)).float() / 2
        above = torch.nextafter(half, half * 2)
        below = torch.nextafter(half, half * 0)
        # Two weights that restore the mean: γ·8 in all.
        near = torch.stack([half, above, below, -half, -above, -below]).flatten()
        rest = (half.double() * 16 - near.abs().double().sum()).float() / 2
        rows.append(torch.cat([near, rest, rest]))
    weight, each = torch.stack(rows), (1,) * len(rows)  # every row with a γ of its own
    expected, expected_scale = ternarize(weight, DENSE, None, each)
    assert 0.1 < expected[:, :6].abs().float().mean() < 0.9  # both sides were met
    ternary, scale = derived(weight, DENSE, each)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(ternary, expected)


def test_one_row_one_group_zero_weight():
    for weight in (torch.randn(1, 8), torch.zeros(3, 16), torch.randn(1, 4)):
        pattern = Pattern(6, 8) if weight.shape[-1] % 8 == 0 else DENSE
        ternary, scale = derived(weight, pattern)
        expected, gamma = ternarize(weight, pattern)
        assert torch.equal(ternary, expected)
        assert torch.equal(scale, gamma)


def test_rows_of_one_rank_of_several():
    """γ given for three logical matrices, of which the second has no rows here."""
    weight = torch.randn(4, 16)
    scale = torch.tensor([0.5, 7.0, 1.5])
    ternary, same = derived(weight, Pattern(6, 8), (3, 0, 1), scale)
    rows = torch.tensor([0.5, 0.5, 0.5, 1.5])
    assert torch.equal(ternary, ternarize_with(weight, rows, Pattern(6, 8), Method()))
    assert same is scale


def test_what_sharded_training_asks_for(monkeypatch):
    """The same as FSDP2's hook does, on a rank without rows of one matrix, and of any dtype."""
    monkeypatch.setattr(kernels, "runs_triton", lambda tensor: True)
    weight, scale = torch.randn(4, 16), torch.tensor([0.5, 7.0])
    for sizes in ((4, 0), (0, 4)):
        packed, _ = kernels.two_bits(weight, Pattern(6, 8), Method(), sizes, scale)
        rows = scale[0 if sizes[0] else 1].expand(4)
        expected = ternarize_with(weight, rows, Pattern(6, 8), Method())
        assert torch.equal(two_bit.unpack_rows(packed, 16), expected)
        sums, counts = kernels.scale_sums(weight, Pattern(6, 8), Method(), sizes).sum(-1)
        assert counts.tolist() == [16.0 * n for n in sizes]
        torch.testing.assert_close(sums.sum(), weight.double().abs().sum())
    close = torch.ones(1, 8, dtype=torch.float64)
    close[0, 0] -= 1e-12  # smaller, but not as float32
    packed, _ = kernels.two_bits(close, Pattern(7, 8), Method())
    assert two_bit.unpack_rows(packed, 8).tolist() == [[0, 1, 1, 1, 1, 1, 1, 1]]


def test_the_last_group_of_a_row_does_not_see_the_next_row():
    weight = torch.full((2, 8), 0.5)
    weight[1] = 100.0
    ternary, _ = derived(weight, Pattern(6, 8), (1, 1))
    assert ternary.tolist() == [[1, 1, 1, 1, 1, 1, 0, 0]] * 2
