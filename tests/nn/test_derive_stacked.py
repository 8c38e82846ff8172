"""Deriving many small weights together gives what each gives alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparse_bitnet.core import Method
from sparse_bitnet.nn import convert, converted_modules, set_pattern
from sparse_bitnet.nn.derived import _derive_stacked

METHODS = [
    Method(),
    Method(order="mask-then-quant"),
    Method(mask_source="quantized"),
    Method(gradient="masked"),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("kind", ["bitnet", "bf16"])
@pytest.mark.parametrize("pattern", ["6:8", "2:4", "dense"])
def test_stacked_equals_alone(method: Method, kind: str, pattern: str) -> None:
    torch.manual_seed(0)
    shapes = [(16, 24), (16, 24), (24, 16), (16, 24), (24, 16), (8, 8)]
    model = nn.Sequential(*(nn.Linear(i, o, bias=False) for o, i in shapes))
    convert(model, "4:8", kind=kind, method=method)  # type: ignore[arg-type]
    set_pattern(model, pattern)
    modules = [module for _, module in converted_modules(model)]
    for module in modules:
        for weight in module.master_parameters().values():
            weight.data.normal_()
        module.invalidate()
    _derive_stacked(modules)
    stacked = [{name: b.clone() for name, b in module.named_buffers()} for module in modules]
    assert [m._derived_from is not None for m in modules] == [True] * 5 + [False]
    for module in modules:
        module.invalidate()
        module.refresh()
    for before, module in list(zip(stacked, modules, strict=True))[:5]:
        for name, buffer in module.named_buffers():
            assert torch.equal(before[name], buffer), name
