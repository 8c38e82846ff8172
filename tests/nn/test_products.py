"""Without sparse tensor cores every choice is dense, and asking for sparse changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sparse_bitnet.core import Pattern
from sparse_bitnet.formats.windows import lift
from sparse_bitnet.kernels import quantize_activations, training
from sparse_bitnet.kernels.quantize_activations import quantize_with_lifted
from sparse_bitnet.nn import choose_products, convert, use_products


def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(16, 24), nn.SiLU(), nn.Linear(24, 8))
    convert(made, "6:8")
    return made


def test_dense_without_a_gpu() -> None:
    assert choose_products(model(), 4096) == {"0": "dense", "2": "dense"}
    choice = training.choose(4096, 4096, Pattern(6, 8), 4096, torch.device("cpu"))
    assert choice.why == "no sparse tensor cores"


def test_asking_for_sparse_on_a_cpu_changes_nothing() -> None:
    plain, asked = model(), model()
    use_products(asked, {"0": "sparse", "2": "sparse"})
    assert asked[0].group is None
    x = torch.randn(5, 16)
    assert torch.equal(plain(x), asked(x))
    assert torch.equal(copy.deepcopy(asked)(x), plain(x))


def test_both_forms_of_the_activations() -> None:
    x = torch.randn(3, 5, 24)
    plain, lifted, scale = quantize_with_lifted(x, 8)
    expected, expected_scale = quantize_activations(x)
    assert torch.equal(plain, expected)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(lifted, lift(expected, 8))


@pytest.mark.parametrize("group", [0, 8])
def test_a_sparse_product_is_traced_without_a_break(
    monkeypatch: pytest.MonkeyPatch, group: int
) -> None:
    """The branch that only a GPU takes, with a stand-in for its product."""

    def stand_in(
        operand: Tensor, x_scale: Tensor, ternary: Tensor, group: int, w_scale: Tensor, bias: Tensor
    ) -> Tensor:
        assert operand.shape[-1] == (24 if group else 16)
        total = operand.float().sum(-1, keepdim=True)
        return (total * x_scale * w_scale + bias).to(torch.bfloat16)

    monkeypatch.setattr(training, "sparse_matmul", stand_in)
    layer = model()[0]
    layer.group = group
    layer.compile(fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(5, 16))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.weight.grad is not None
