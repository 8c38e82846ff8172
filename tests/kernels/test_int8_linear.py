"""The product of an int8 head against float64, on hostile shapes and values."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_bitnet.core import WeightError
from sparse_bitnet.kernels import native
from sparse_bitnet.kernels.int8_linear import int8_linear, reference

SHAPES = [(1, 1, 1), (1, 8, 3), (3, 33, 17), (2, 1024, 5), (5, 2500, 7), (0, 8, 4)]


def operands(tokens, width, rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator)
    weight = torch.randint(-127, 128, (rows, width), generator=generator, dtype=torch.int8)
    return x, weight, torch.rand(rows, generator=generator) + 0.01


@pytest.mark.parametrize("shape", SHAPES)
def test_two_terms_leave_nothing_worth_mention(shape):
    x, weight, scale = operands(*shape)
    exact = (x.double() @ weight.double().t()) * scale.double()
    # A lane is off by half a second step: the first step over 254, half of that.
    bound = x.abs().amax(-1, keepdim=True) / 127 / 254 / 2 if x.numel() else x.sum()
    error = (int8_linear(x, weight, scale).double() - exact).abs()
    assert (error <= bound * weight.abs().sum(-1) * scale * 1.01 + 1e-5).all()


def test_a_few_large_lanes_do_not_silence_the_others():
    x, weight, scale = operands(4, 256, 9)
    x[:, 3] *= 500
    weight[:, 3] = 0
    exact = (x.double() @ weight.double().t()) * scale.double()
    error = (int8_linear(x, weight, scale) - exact).abs().max() / exact.abs().max()
    one_term = reference.quantize_int8(x)
    rough = (one_term[0].double() * one_term[1]) @ weight.double().t() * scale
    assert error < 0.01
    assert (rough - exact).abs().max() / exact.abs().max() > 0.5  # what one term makes of it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_shapes_and_bias(dtype):
    x, weight, scale = operands(6, 40, 11)
    bias = torch.randn(11)
    y = int8_linear(x.view(2, 3, 40).to(dtype), weight, scale, bias)
    assert y.dtype == dtype and y.shape == (2, 3, 11)
    exact = (x.to(dtype).double() @ weight.double().t()) * scale + bias
    assert torch.allclose(y.double().view(6, 11), exact, rtol=1e-2, atol=2e-2)
    assert int8_linear(x, weight, scale, out_dtype=torch.float64).dtype == torch.float64


def test_a_token_is_a_token_whatever_stands_beside_it():
    x, weight, scale = operands(7, 64, 12)
    together = int8_linear(x, weight, scale)
    alone = torch.cat([int8_linear(row[None], weight, scale) for row in x])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("tokens", [1, 4, 5, 40])
def test_equals_the_reference_whatever_serves(tokens):
    x, weight, scale = operands(tokens, 200, 30)
    bias = torch.randn(30)
    expected = reference.int8_linear(x, weight, scale, bias)
    for path in native.available():
        with native.forced(path):
            assert torch.equal(int8_linear(x, weight, scale, bias), expected), path


def test_zeros_and_extremes():
    _, weight, scale = operands(2, 16, 4)
    assert torch.equal(int8_linear(torch.zeros(2, 16), weight, scale), torch.zeros(2, 4))
    weight.fill_(-128)
    y = int8_linear(torch.full((1, 16), 1e30), weight, torch.ones(4))
    assert torch.allclose(y, torch.full((1, 4), -128 * 16e30), rtol=1e-4)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 5), st.integers(1, 3000), st.integers(1, 5), st.integers(0, 9))
def test_the_reference_is_exact(tokens, width, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    x_q = torch.randint(-127, 128, (tokens, width), generator=generator, dtype=torch.int8)
    weight = torch.randint(-128, 128, (rows, width), generator=generator, dtype=torch.int8)
    if seed == 0:
        x_q, weight = x_q.fill_(127), weight.fill_(-128)
    exact = (x_q.long() @ weight.long().t()).to(torch.int32)
    assert torch.equal(reference.int8_matmul(x_q, weight), exact)


def test_no_sum_saturates_without_vnni():
    """Pairs of extremes, in a process whose PyTorch may use nothing beyond AVX2."""
    environment = {k: v for k, v in os.environ.items() if k != native.VARIABLE}
    environment |= {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    subprocess.run([sys.executable, "-c", EXTREMES], env=environment, check=True)


EXTREMES = """
from itertools import product
import torch
from sparse_bitnet.kernels import integer_matmul, native
from sparse_bitnet.kernels.int8_linear import int8_linear

for path, tokens, width, x in product(
    {native.path(), "reference"}, (1, 5, 40), (2, 100, 1024), (-1.0, 1.0)
):
    with native.forced(path):
        rows = torch.full((tokens, width), x)
        for w in (-128, -127, 127):
            weight = torch.full((33, width), w, dtype=torch.int8)
            y = int8_linear(rows, weight, torch.ones(33))
            torch.testing.assert_close(y, torch.full((tokens, 33), x * w * width))
        x_q = (127 * rows).to(torch.int8)
        for t in (-1, 1):
            ternary = torch.full((33, width), t, dtype=torch.int8)
            assert (integer_matmul(x_q, ternary) == int(127 * x * t * width)).all()
"""


def test_rows_that_int32_cannot_sum_are_refused():
    longest = reference.LONGEST_ROW - 1
    x, weight = torch.ones(1, longest), torch.full((1, longest), 127, dtype=torch.int8)
    y = int8_linear(x, weight, torch.ones(1))
    torch.testing.assert_close(y, torch.full((1, 1), 127.0 * longest))
    for function in (int8_linear, reference.int8_linear):
        with pytest.raises(
            WeightError, match="int8 weight: 131072 input features cannot be summed"
        ):
            function(torch.ones(1, 2**17), torch.ones(1, 2**17, dtype=torch.int8), torch.ones(1))
