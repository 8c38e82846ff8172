"""When buffers are derived: once after each optimizer step, and after whatever else changes
weights; never in between."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from sparse_bitnet.core import Pattern, method_mask, ternarize
from sparse_bitnet.nn import (
    DerivedModule,
    SparseBitExperts,
    SparseBitLinear,
    SparseLinear,
    convert,
    converted_modules,
    master_weights,
    refresh,
    set_pattern,
)

OPTIMIZERS: list[Callable[[Any], torch.optim.Optimizer]] = [
    lambda p: torch.optim.SGD(p, lr=0.1),
    lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
]


def two_layers(pattern: str = "6:8", kind: Any = "bitnet") -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))
    convert(model, pattern, kind=kind)
    return model


def is_fresh(model: nn.Module) -> bool:
    """Whether every buffer is what its master weight gives now."""
    for _, module in converted_modules(model):
        for name, weight in module.master_parameters().items():
            pattern, method, segments = module.pattern, module.method, module.segments_of(name)
            prefix = "" if name == "weight" else f"{name}_"
            buffers = dict(module.named_buffers(recurse=False))
            if f"{prefix}ternary" in buffers:
                ternary, scale = ternarize(weight, pattern, method, segments)
                if not torch.equal(buffers[f"{prefix}ternary"], ternary):
                    return False
                if not torch.equal(buffers[f"{prefix}scale"], scale):
                    return False
            else:
                mask = method_mask(weight, pattern, method, segments)
                expected = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
                if not torch.equal(buffers[f"{prefix}mask"], expected):
                    return False
    return True


def backward(model: nn.Module) -> None:
    model(torch.randn(4, 16)).square().sum().backward()


@pytest.mark.parametrize("optimizer_of", OPTIMIZERS, ids=["sgd", "adamw", "foreach", "fused"])
@pytest.mark.parametrize("kind", ["bitnet", "bf16"])
def test_exactly_once_a_step(
    derives: list[nn.Module], kind: str, optimizer_of: Callable[[Any], torch.optim.Optimizer]
) -> None:
    """Micro-batches, evaluation and recomputation reuse what the step derived."""
    model = two_layers(kind=kind)
    optimizer = optimizer_of(model.parameters())
    derives.clear()
    for _ in range(3):
        for _ in range(2):
            backward(model)
            y = checkpoint(model, torch.randn(4, 16), use_reentrant=False)
            y.sum().backward()
        with torch.no_grad():
            model.eval()(torch.randn(4, 16))
        with torch.inference_mode():
            model(torch.randn(4, 16))
        model.train()
        assert not derives
        optimizer.step()
        assert derives == [model[0], model[2]]  # already, without a forward
        assert is_fresh(model)
        optimizer.zero_grad()
        derives.clear()


def test_two_optimizers_refresh_their_own(derives: list[nn.Module]) -> None:
    model = two_layers()
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    second = torch.optim.SGD(model[2].parameters(), lr=0.1)
    backward(model)
    derives.clear()
    first.step()
    assert derives == [model[0]]
    second.step()
    assert derives == [model[0], model[2]]
    assert is_fresh(model)


def test_an_optimizer_of_another_model_refreshes_nothing(derives: list[nn.Module]) -> None:
    model = two_layers()
    other = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.randn(2, 3)).sum().backward()
    derives.clear()
    optimizer.step()
    assert not derives
    assert is_fresh(model)


def test_an_optimizer_made_before_convert_still_counts(derives: list[nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert(model)
    derives.clear()
    backward(model)
    optimizer.step()
    assert derives == [model[0]]
    assert is_fresh(model)


def test_a_closure_that_changes_weights_inside_a_step() -> None:
    model = two_layers()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3, line_search_fn="strong_wolfe")
    x = torch.randn(4, 16)

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(x).square().sum()
        assert is_fresh(model)
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    assert is_fresh(model)


@pytest.mark.parametrize("kind", ["bitnet", "bf16"])
class TestChanges:
    """Changes outside an optimizer, each followed by a forward that must use the new weight."""

    def test_in_place(self, kind: str) -> None:
        model = two_layers(kind=kind)
        with torch.no_grad():
            for parameter in model.parameters():
                nn.init.normal_(parameter)
        model(torch.randn(2, 16))
        assert is_fresh(model)

    def test_in_place_in_inference_mode(self, kind: str) -> None:
        model = two_layers(kind=kind)
        with torch.no_grad():
            model[0].weight.mul_(-2)
        with torch.inference_mode():
            model(torch.randn(2, 16))
        assert is_fresh(model)

    def test_replaced_parameter(self, kind: str) -> None:
        """Two parameters with equal version counters."""
        model = two_layers(kind=kind)
        for _ in range(3):
            model[0].weight = nn.Parameter(torch.randn(16, 16))
            model(torch.randn(2, 16))
            assert is_fresh(model)

    def test_through_data_needs_refresh(self, kind: str) -> None:
        model = two_layers(kind=kind)
        model[0].weight.data = torch.randn(16, 16)
        refresh(model)
        assert is_fresh(model)

    @pytest.mark.parametrize("assign", [False, True])
    def test_load_state_dict(self, kind: str, assign: bool) -> None:
        model = two_layers(kind=kind)
        model.load_state_dict(
            {name: torch.randn_like(value) for name, value in model.state_dict().items()},
            assign=assign,
        )
        assert is_fresh(model)  # without a forward: a compiled one would not look

    def test_load_state_dict_of_one_submodule(self, kind: str) -> None:
        model = two_layers(kind=kind)
        model[0].load_state_dict({"weight": torch.randn(16, 16), "bias": torch.randn(16)})
        assert is_fresh(model)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_to_another_dtype(self, kind: str, dtype: torch.dtype) -> None:
        model = two_layers(kind=kind).to(dtype)
        assert is_fresh(model)
        for _, module in converted_modules(model):
            kinds = {buffer.dtype for buffer in module.buffers()}
            assert kinds <= {torch.int8, torch.float32, torch.bool}  # scales are never rounded
        assert model(torch.randn(2, 16, dtype=dtype)).dtype == dtype

    def test_meta_to_empty_and_load(self, kind: str) -> None:
        source = two_layers(kind=kind)
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))
        convert(model, kind=kind)
        assert all(buffer.is_meta for buffer in model.buffers())
        model.to_empty(device="cpu")
        model.load_state_dict(source.state_dict())
        x = torch.randn(2, 16)
        assert torch.equal(model(x), source(x))

    def test_meta_and_load_by_assignment(self, kind: str) -> None:
        source = two_layers(kind=kind)
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))
        convert(model, kind=kind)
        model.load_state_dict(source.state_dict(), assign=True)
        x = torch.randn(2, 16)
        assert torch.equal(model(x), source(x))

    def test_meta_forward_knows_shapes(self, kind: str) -> None:
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(16, 8))
            convert(model, kind=kind)
            assert model(torch.empty(3, 16)).shape == (3, 8)

    def test_set_pattern(self, kind: str) -> None:
        model = two_layers(kind=kind)
        for pattern in ("4:8", "dense", "2:4", "8:8"):
            set_pattern(model, pattern)
            assert is_fresh(model)
            assert {str(module.pattern) for _, module in converted_modules(model)} == {
                str(Pattern.parse(pattern))
            }

    def test_deepcopy_is_independent(self, kind: str) -> None:
        model = two_layers(kind=kind)
        twin = copy.deepcopy(model)
        optimizer = torch.optim.SGD(twin.parameters(), lr=1.0)
        before = model[0].weight.detach().clone()
        backward(twin)
        optimizer.step()
        assert is_fresh(twin)
        assert is_fresh(model)
        assert torch.equal(model[0].weight, before)
        assert not torch.equal(twin[0].weight, before)

    def test_pickle_round_trip(self, kind: str) -> None:
        """Data loaders and spawned workers pickle; files of ours never are."""
        model = two_layers(kind=kind)
        twin = pickle.loads(pickle.dumps(model))
        optimizer = torch.optim.SGD(twin.parameters(), lr=1.0)
        backward(twin)
        optimizer.step()
        assert is_fresh(twin)


def test_set_pattern_to_the_same_derives_nothing(derives: list[nn.Module]) -> None:
    model = two_layers()
    derives.clear()
    set_pattern(model, "6:8")
    assert not derives


def test_averaged_models_follow() -> None:
    model = two_layers()
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(2):
        backward(model)
        optimizer.step()
        average.update_parameters(model)
    average(torch.randn(2, 16))
    assert is_fresh(average)


def test_forgotten_models_are_collected() -> None:
    """The list of living modules must not keep them alive."""
    import gc
    import weakref

    model = two_layers()
    gone = weakref.ref(model[0])
    del model
    gc.collect()
    assert gone() is None


def test_master_weights_and_masks(tiny: Callable[..., PreTrainedModel]) -> None:
    model = tiny("mixtral")
    convert(model, "2:4", rules={"q_proj": "dense"})
    weights = {weight.name: weight for weight in master_weights(model)}
    parameters = dict(model.named_parameters())
    assert all(parameters[name] is weight.weight for name, weight in weights.items())
    experts = weights["model.layers.0.mlp.experts.gate_up_proj"]
    assert experts.segments == (48, 48)
    assert experts.mask is not None
    assert experts.mask.shape == (4, 96, 32)
    assert weights["model.layers.0.self_attn.q_proj.weight"].mask is None
    assert isinstance(experts.module, SparseBitExperts)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing_of_a_whole_model(
    tiny: Callable[..., PreTrainedModel], tokens: Tensor, derives: list[nn.Module]
) -> None:
    gradients = []
    for enabled in (False, True):
        model = tiny()
        convert(model)
        model.train()
        if enabled:
            model.gradient_checkpointing_enable()
        derives.clear()
        model(input_ids=tokens, labels=tokens).loss.backward()
        assert not derives
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_kinds_share_one_base() -> None:
    assert issubclass(SparseBitLinear, DerivedModule)
    assert issubclass(SparseLinear, DerivedModule)
