"""A gated MLP as one function: what its three layers compute, and everything else untouched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

from sparse_bitnet.core import Method
from sparse_bitnet.nn import SparseBitLinear, convert, set_pattern
from sparse_bitnet.nn import gated_mlp as room
from sparse_bitnet.nn.gated_mlp import GatedMLP, GatedProducts, join_gated_mlps

Tiny = Callable[..., PreTrainedModel]
HIDDEN, INNER = 32, 48


def known(bias: bool = False) -> LlamaMLP:
    """Of a class that is known."""
    config = LlamaConfig(hidden_size=HIDDEN, intermediate_size=INNER, mlp_bias=bias)
    return LlamaMLP(config)


class PlainMLP(LlamaMLP):
    """Of a class that is not known, so its layers run one by one."""


def pair(pattern: str = "6:8", bias: bool = False, **method: Any) -> tuple[nn.Module, GatedMLP]:
    """The layers one by one, and joined; of equal weights."""
    plain = nn.Sequential(known(bias))
    plain[0].__class__ = PlainMLP
    convert(plain, pattern, method=Method(**method))
    joined = copy.deepcopy(plain[0])
    joined.__class__ = GatedMLP
    assert isinstance(joined, GatedMLP)
    return plain[0], joined


def joined_in(model: nn.Module) -> int:
    return sum(isinstance(module, GatedMLP) for module in model.modules())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """As if a GPU were there; grows with every use of the function."""
    seen: list[bool] = []

    real = GatedProducts.apply
    monkeypatch.setattr(room, "_on_gpu_in_bf16", lambda x: True)
    monkeypatch.setattr(GatedProducts, "apply", lambda *a: (seen.append(True), real(*a))[1])
    return seen


def step(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    inside = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = module(inside)
    y.backward(dy)
    grads = [p.grad for p in module.parameters()]
    assert inside.grad is not None
    results = [y.detach(), inside.grad, *(g for g in grads if g is not None)]
    module.zero_grad()
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32, HIDDEN), (2, 5, HIDDEN), (0, HIDDEN)])
@pytest.mark.parametrize("pattern", ["dense", "6:8"])
def test_full_precision_backward_is_the_same(
    calls: list[bool], pattern: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    plain, joined = pair(pattern)
    x, dy = torch.randn(shape).to(dtype), torch.randn(shape).bfloat16()
    expected, ours = step(plain, x, dy), step(joined, x, dy)
    assert calls
    assert len(ours) == 5
    for theirs, mine in zip(expected, ours, strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("shape", [(32, HIDDEN), (2, 16, HIDDEN), (3, 5, HIDDEN), (0, HIDDEN)])
def test_fp8_backward_rounds_once(calls: list[bool], shape: tuple[int, ...]) -> None:
    """Each result as far from exact gradients as one by one; without fp8 sizes, the same."""
    plain, joined = pair(backward="fp8")
    exact, _ = pair()
    exact.load_state_dict(plain.state_dict())
    x, dy = torch.randn(shape), torch.randn(shape).bfloat16()
    expected, ours, full = step(plain, x, dy), step(joined, x, dy), step(exact, x, dy)
    assert calls
    assert torch.equal(ours[0], expected[0])
    for theirs, mine, reference in zip(expected[1:], ours[1:], full[1:], strict=True):
        if x.numel() == 0 or shape == (3, 5, HIDDEN):
            assert torch.equal(mine, theirs)
            continue
        # e4m3 rounds by 2⁻⁴ at most, 2⁻⁵ in the mean, an operand of each of two products.
        assert (mine - reference).norm() < 6e-2 * reference.norm()
        assert (mine - reference).norm() < 1.1 * (theirs - reference).norm()


@pytest.mark.parametrize("backward", ["full", "fp8"])
@pytest.mark.parametrize("trained", [(), ("gate",), ("up",), ("down",), ("gate", "down")])
@pytest.mark.parametrize("needs_x", [True, False])
def test_only_what_is_wanted(
    calls: list[bool], trained: tuple[str, ...], backward: Any, needs_x: bool
) -> None:
    if not (trained or needs_x):
        pytest.skip("nothing to do")
    plain, joined = pair(backward=backward)
    x, dy = torch.randn(16, HIDDEN), torch.randn(16, HIDDEN).bfloat16()
    results = []
    for module in (plain, joined):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name.split("_")[0] in trained)
        inside = x.clone().requires_grad_(needs_x)
        with torch.autocast("cpu", torch.bfloat16):
            module(inside).backward(dy)
        results.append([inside.grad, *(p.grad for p in module.parameters())])
    assert calls
    for theirs, mine in zip(*results, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert (mine - theirs).norm() < (6e-2 if backward == "fp8" else 1e-9) * theirs.norm()


def hook(module: nn.Module) -> None:
    module.up_proj.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]


def hook_silu(module: nn.Module) -> None:
    module.act_fn.register_forward_pre_hook(lambda *_: None)  # type: ignore[union-attr]


def other_function(module: nn.Module) -> None:
    module.act_fn = nn.GELU()


def own_forward(module: nn.Module) -> None:
    """As libraries do it that move weights between devices."""
    layer: Any = module.down_proj
    layer.forward = lambda x: 2 * SparseBitLinear.forward(layer, x)


def lay_out(module: nn.Module) -> None:
    module.down_proj.group = 0


def own_scales(module: nn.Module) -> None:
    module.gate_proj.segments = (INNER // 2, INNER // 2)


def subclass(module: nn.Module) -> None:
    class Sharded(SparseBitLinear):
        pass

    module.gate_proj.__class__ = Sharded


@pytest.mark.parametrize(
    ("method", "bias", "change"),
    [
        ({}, True, None),
        ({"gradient": "masked"}, False, None),
        ({"activation_bits": 4}, False, None),
        ({}, False, hook),
        ({}, False, hook_silu),
        ({}, False, other_function),
        ({}, False, own_forward),
        ({}, False, own_scales),
        ({}, False, subclass),
    ],
)
def test_what_the_function_does_not_serve_runs_one_by_one(
    calls: list[bool], method: Any, bias: bool, change: Any
) -> None:
    plain, joined = pair(bias=bias, **method)
    for module in (plain, joined):
        if change is not None:
            change(module)
    x, dy = torch.randn(16, HIDDEN), torch.randn(16, HIDDEN).bfloat16()
    for theirs, mine in zip(step(plain, x, dy), step(joined, x, dy), strict=True):
        assert torch.equal(mine, theirs)
    assert not calls


def test_sparse_products_run_one_by_one(calls: list[bool], monkeypatch: Any) -> None:
    _, joined = pair()
    lay_out(joined)
    monkeypatch.setattr(SparseBitLinear, "forward", lambda self, x: x.new_zeros(1))
    joined(torch.randn(4, HIDDEN))
    assert not calls


def test_a_cpu_runs_one_by_one(monkeypatch: Any) -> None:
    monkeypatch.setattr(GatedProducts, "apply", None)
    plain, joined = pair()
    x, dy = torch.randn(16, HIDDEN), torch.randn(16, HIDDEN).bfloat16()
    for theirs, mine in zip(step(plain, x, dy), step(joined, x, dy), strict=True):
        assert torch.equal(mine, theirs)


def test_what_is_not_finite_shows(calls: list[bool]) -> None:
    for backward in ("full", "fp8"):
        _, joined = pair(backward=backward)
        x, dy = torch.randn(16, HIDDEN), torch.randn(16, HIDDEN).bfloat16()
        dy[3, 4] = torch.nan
        y, dx, *dw = step(joined, x, dy)
        assert y.isfinite().all()
        assert dx[3].isnan().all()
        assert dx[4:].isfinite().all()
        assert all(d.isnan().any() for d in dw)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama", "mistral"])
def test_a_model_keeps_its_names_and_learns(
    calls: list[bool], tiny: Tiny, architecture: str
) -> None:
    model = tiny(architecture)
    keys = list(model.state_dict())
    names = [name for name, _ in model.named_parameters()]
    parameters = {id(p) for p in model.parameters()}
    convert(model, "6:8")
    join_gated_mlps(model)
    assert joined_in(model) == 2
    assert join_gated_mlps(model) == 0
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_parameters()] == names
    assert {id(p) for p in model.parameters()} == parameters
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = torch.randint(0, 64, (2, 16))
    losses = []
    for pattern in ("dense", "6:8", "4:8", "4:8", "4:8"):
        set_pattern(model, pattern)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert len(calls) == 10
    assert losses[-1] < losses[0]


def test_edited_weights_are_seen(calls: list[bool]) -> None:
    plain, joined = pair()
    x, dy = torch.randn(8, HIDDEN), torch.randn(8, HIDDEN).bfloat16()
    for module in (plain, joined):
        with torch.no_grad():
            module.up_proj.weight.neg_()  # type: ignore[operator, union-attr]
    assert torch.equal(step(joined, x, dy)[0], step(plain, x, dy)[0])


def test_hooks_and_copies_of_the_module_stay() -> None:
    model = nn.Sequential(known())
    joined, seen, loaded = model[0], [], []
    joined.register_forward_hook(lambda module, *_: seen.append(module))
    joined.register_load_state_dict_pre_hook(lambda module, *_: loaded.append(module))
    joined.eval()
    convert(model, "6:8")
    assert model[0] is joined
    assert isinstance(joined, GatedMLP)
    model.load_state_dict(model.state_dict())
    assert loaded == [joined]
    assert not joined.training
    joined(torch.randn(2, HIDDEN))
    assert seen == [joined]
    other = copy.deepcopy(joined)
    assert other.gate_proj is not joined.gate_proj
    x = torch.randn(3, HIDDEN)
    assert torch.equal(other(x), joined(x))


class Clamped(nn.Module):
    """Of a name that is known, and another forward."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(HIDDEN, INNER), nn.Linear(HIDDEN, INNER)
        self.down_proj, self.act_fn = nn.Linear(INNER, HIDDEN), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=0.1))
        return result


def test_others_are_left_alone() -> None:
    different, foreign = known(), Clamped()
    different.act_fn = nn.GELU()
    Clamped.__name__ = "LlamaMLP"
    plain = PlainMLP(LlamaConfig(hidden_size=HIDDEN, intermediate_size=INNER))
    model = nn.ModuleList([plain, different, foreign])
    convert(model, "6:8")
    assert join_gated_mlps(model) == joined_in(model) == 0
    partly = nn.Sequential(known())
    convert(partly, "6:8", rules={"up_proj": "skip"})
    assert join_gated_mlps(partly) == joined_in(partly) == 0


def test_a_module_that_stands_twice_stays_one(tiny: Tiny) -> None:
    model: Any = tiny("qwen2")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    keys = list(model.state_dict())
    convert(model, "6:8")
    assert joined_in(model) == 1
    assert model.model.layers[1].mlp is model.model.layers[0].mlp
    assert list(model.state_dict()) == keys


def test_a_forward_that_was_replaced_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: x)
    model = nn.Sequential(known())
    convert(model, "6:8")
    assert joined_in(model) == 0
