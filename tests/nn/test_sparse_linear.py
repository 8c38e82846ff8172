"""The BF16 baseline: masked forward, dense gradient, nothing else."""

import pytest
import torch
from torch import nn

from sparse_bitnet.core import Method, Pattern, nm_mask
from sparse_bitnet.nn import SparseLinear


def baseline(pattern="6:8", method=None):
    torch.manual_seed(0)
    linear = nn.Linear(16, 6)
    return linear, SparseLinear(linear, Pattern.parse(pattern), method)


@pytest.mark.parametrize("pattern", ["dense", "8:8"])
def test_dense_is_the_linear_layer(pattern):
    linear, module = baseline(pattern)
    x = torch.randn(3, 16)
    assert torch.equal(module(x), linear(x))
    assert module.derived() == (None,)


def test_masks_forward():
    linear, module = baseline()
    mask = nm_mask(linear.weight, Pattern(6, 8))
    x = torch.randn(2, 3, 16)
    expected = nn.functional.linear(x, linear.weight * mask, linear.bias)
    assert torch.equal(module(x), expected)
    assert torch.equal(module.derived()[0], mask)


@pytest.mark.parametrize("gradient", ["dense", "masked"])
def test_gradients_equal_the_formulas(gradient):
    linear, module = baseline(method=Method(gradient=gradient))
    module.double()
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(5, 6, dtype=torch.float64)
    assert module.bias is not None
    dx, dw, db = torch.autograd.grad(module(x), (x, module.weight, module.bias), dy)
    mask = nm_mask(linear.weight, Pattern(6, 8))
    torch.testing.assert_close(dx, dy @ (linear.weight * mask), rtol=1e-12, atol=1e-12)
    full = dy.t() @ x
    expected = full * mask if gradient == "masked" else full
    torch.testing.assert_close(dw, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(db, dy.sum(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pattern", ["6:8", "dense"])
def test_half_precision_inputs_meet_float32_master_weights(pattern):
    _, module = baseline(pattern)
    x = torch.randn(3, 16)
    assert module(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            y = module(x.to(dtype).requires_grad_())
            assert y.dtype == torch.bfloat16
            y.sum().backward()
    assert module.weight.grad.dtype == torch.float32
