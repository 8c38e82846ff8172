"""Fused projections: the same numbers as the separate linears."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparse_bitnet.core import ConfigError, Method
from sparse_bitnet.nn import convert
from sparse_bitnet.nn.fuse import FusedMLP, Part, fuse, join
from sparse_bitnet.nn.pack import pack_module
from sparse_bitnet.nn.packed_linear import PackedLinear
from sparse_bitnet.nn.packed_module import prepare
from sparse_bitnet.nn.sparse_bit_linear import SparseBitLinear

Tiny = Callable[..., PreTrainedModel]


def packed(model: nn.Module, **changes: Any) -> nn.Module:
    convert(model, "6:8", **changes)
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseBitLinear):
            model.set_submodule(name, pack_module(module, "two-bit", name))
    return model


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama", "mistral"])
@pytest.mark.parametrize("bits", [8, 4, None])
def test_fused_models_compute_the_same(
    tiny: Tiny, tokens: Tensor, logits: Any, architecture: str, bits: Any
) -> None:
    model: nn.Module = tiny(architecture)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    if bits:
        model = packed(model, method=Method(activation_bits=bits))
    # PyTorch's silu differs by an ulp between contiguous and strided rows, which in float32 now and
    # then turns a rounding of the quantizer the other way; in float64 the quantizer never sees it.
    model.double().eval()
    before = logits(model, tokens)
    layers = model.config.num_hidden_layers  # type: ignore[union-attr]
    assert fuse(model) == 3 * layers  # type: ignore[operator]
    assert not any(name.endswith((".up_proj", ".gate_proj")) for name, _ in model.named_modules())
    after = logits(model, tokens)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)
    assert fuse(model) == 0


def test_every_matrix_keeps_its_own_scale_and_bias() -> None:
    linears = [nn.Linear(16, out, bias=out != 5) for out in (3, 5, 8)]
    parts = [pack_module(SparseBitLinear(linear), "trits", "l") for linear in linears]
    joined = join(list(parts))
    assert isinstance(joined, PackedLinear)
    assert joined.spec.segments == (3, 5, 8)
    x = torch.randn(4, 16)
    assert torch.equal(joined(x), torch.cat([part(x) for part in parts], dim=-1))


def test_nothing_is_kept_when_all_parts_are_taken() -> None:
    model = FakeAttention()
    assert fuse(nn.ModuleList([model])) == 2
    model(torch.randn(2, 16))
    assert model.q_proj.shared.last is None  # type: ignore[union-attr]


def test_an_input_of_its_own_is_multiplied_for_itself() -> None:
    model = FakeAttention()
    x, other = torch.randn(2, 16), torch.randn(2, 16)
    expected = [model.q_proj(x), model.k_proj(other), model.v_proj(x)]
    fuse(nn.ModuleList([model]))
    found = [model.q_proj(x), model.k_proj(other), model.v_proj(x)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_an_input_that_was_written_to_is_multiplied_again() -> None:
    model = FakeAttention()
    x = torch.randn(2, 16)
    expected = model.q_proj(2 * x)
    fuse(nn.ModuleList([model]))
    model.q_proj(x)
    torch.testing.assert_close(model.q_proj(x.mul_(2)), expected)


def test_a_fused_model_is_not_saved(tiny: Tiny, tmp_path: Path) -> None:
    model: Any = packed(tiny())
    model.save_pretrained(tmp_path / "before")
    fuse(model)
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.q_proj: .* save before fuse"):
        model.save_pretrained(tmp_path / "after")
    assert not list((tmp_path / "after").glob("*.safetensors"))
    with pytest.raises(ConfigError, match=r"^model: its layers were joined"):
        model.model.layers[0].mlp.state_dict()


def test_threads_do_not_take_from_each_other() -> None:
    model = FakeAttention()
    inputs = [torch.randn(2, 16) for _ in range(8)]
    expected = [model(x) for x in inputs]
    fuse(nn.ModuleList([model]))
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            for found, wanted in zip(pool.map(model, inputs), expected, strict=True):
                torch.testing.assert_close(found, wanted)


def test_compiles_without_a_break(tiny: Tiny, tokens: Tensor, logits: Any) -> None:
    model = packed(tiny()).eval()
    fuse(model)
    before = logits(model, tokens)  # lays weights out
    layer = model.model.layers[0]  # type: ignore[union-attr]
    layer.forward = torch.compile(layer.forward, backend="aot_eager", fullgraph=True)  # type: ignore[union-attr]
    assert torch.equal(logits(model, tokens), before)
    assert layer.self_attn.q_proj.shared.last is None  # type: ignore[union-attr]


def test_other_models_stay_as_they_are(tiny: Tiny) -> None:
    model = tiny("mixtral")
    kinds = {type(m).__name__ for m in model.modules()}
    fuse(model)
    assert not any(isinstance(m, FusedMLP | Part) for m in model.modules())
    assert {type(m).__name__ for m in model.modules()} == kinds


def test_a_gated_mlp_of_another_activation_stays(tiny: Tiny, tokens: Tensor, logits: Any) -> None:
    model = packed(tiny("llama", hidden_act="gelu")).eval()
    before = logits(model, tokens)
    assert fuse(model) == 4  # q, k and v of two layers
    assert torch.equal(logits(model, tokens), before)


def test_a_class_of_the_same_name_stays(tiny: Tiny, monkeypatch: Any) -> None:
    model: Any = tiny("qwen2")
    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", lambda self, x: x)
    assert fuse(model) == 4  # q, k and v of two layers
    assert not any(isinstance(module, FusedMLP) for module in model.modules())


def test_hooks_on_the_products_of_an_mlp_are_called(tiny: Tiny, tokens: Tensor) -> None:
    model: Any = packed(tiny("qwen2")).eval()
    fuse(model)
    seen: list[Any] = []
    with torch.no_grad():
        expected = model(tokens).logits
        mlp = model.model.layers[0].mlp
        for layer in (mlp.gate_up_proj, mlp.down_proj):
            layer.register_forward_hook(lambda module, *_: seen.append(module))
        torch.testing.assert_close(model(tokens).logits, expected)
    assert seen == [mlp.gate_up_proj, mlp.down_proj]


def test_hooks_on_the_products_of_a_compiled_mlp_are_called(tiny: Tiny) -> None:
    model: Any = packed(tiny("qwen2")).eval()
    fuse(model)
    prepare(model)
    mlp = copy.deepcopy(model.model.layers[0].mlp)
    x, residual = torch.randn(2, 1, 3, mlp.gate_up_proj.in_features)
    seen: list[Any] = []
    with torch.no_grad():
        expected = residual + mlp(x)
        handle = mlp.down_proj.register_forward_hook(lambda module, *_: seen.append(module))
        for there in (True, False):
            torch._dynamo.reset()
            found = torch.compile(mlp, backend="eager")(x, residual)
            torch.testing.assert_close(found, expected)
            assert (seen == [mlp.down_proj]) is there
            handle.remove()
            seen.clear()


def test_unlike_linears_are_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be joined: Linear in_features=4"):
        join([nn.Linear(4, 4), nn.Linear(8, 4)])


class FakeAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, out) for out in (8, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)


FakeAttention.__name__ = "Qwen2Attention"
