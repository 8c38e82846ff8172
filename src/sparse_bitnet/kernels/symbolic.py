"""Layers compiled for token counts that are not known yet.

``torch.compile`` makes a size symbolic that has changed once, or that it was told will change, and
one graph then serves all its values. Which backend is fastest depends on the token count, so there
a whole layer is one operator, which looks the choice up when it runs. That costs what a compiler
would have fused with a quantization, and saves a compilation for every length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_bitnet.core.pattern import DENSE
from sparse_bitnet.kernels import dispatch
from sparse_bitnet.kernels.library import register
from sparse_bitnet.kernels.weight import TernaryWeight


def _weight(
    columns: int,
    w_scale: Tensor,
    rows: Tensor,
    packed: Tensor | None,
    structured: Tensor | None,
    group: int,
) -> TernaryWeight:
    """The inverse of ``dispatch.parts``, but for the pattern, which no choice depends on."""
    return TernaryWeight(
        DENSE,
        w_scale,
        w_scale.shape[0],
        columns,
        rows,
        packed,
        structured=structured,
        group=group,
    )


def _linear(
    x: Tensor,
    w_scale: Tensor,
    rows: Tensor,
    packed: Tensor | None,
    structured: Tensor | None,
    group: int,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    weight = _weight(x.shape[-1], w_scale, rows, packed, structured, group)
    backend = dispatch.remembered(weight, dispatch.tokens_of(x), out_dtype)
    return dispatch.ternary_linear(x, weight, bias, out_dtype, backend)


def _fake_linear(
    x: Tensor,
    w_scale: Tensor,
    rows: Tensor,
    packed: Tensor | None,
    structured: Tensor | None,
    group: int,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], w_scale.shape[0]), dtype=out_dtype)


def _gated_mlp(
    x: Tensor,
    w_scale: Tensor,
    rows: Tensor,
    packed: Tensor | None,
    structured: Tensor | None,
    group: int,
    w_scale2: Tensor,
    rows2: Tensor,
    packed2: Tensor | None,
    structured2: Tensor | None,
    group2: int,
    out_dtype: torch.dtype,
) -> Tensor:
    gate_up = _weight(x.shape[-1], w_scale, rows, packed, structured, group)
    down = _weight(w_scale.shape[0] // 2, w_scale2, rows2, packed2, structured2, group2)
    tokens = dispatch.tokens_of(x)
    first = dispatch.remembered(gate_up, tokens, out_dtype, deferred=True)
    second = dispatch.remembered(down, tokens, out_dtype)
    return dispatch.gated_mlp_by(first, second, x, gate_up, down, out_dtype)


def _fake_gated_mlp(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], rest[5].shape[0]), dtype=rest[-1])


_PARTS = "Tensor w_scale{0}, Tensor rows{0}, Tensor? packed{0}, Tensor? structured{0}, int group{0}"
register(
    f"linear(Tensor x, {_PARTS.format('')}, Tensor? bias, ScalarType out_dtype) -> Tensor",
    _linear,
    _fake_linear,
)
register(
    f"gated_mlp(Tensor x, {_PARTS.format('')}, {_PARTS.format('2')}, ScalarType out_dtype) "
    "-> Tensor",
    _gated_mlp,
    _fake_gated_mlp,
)
