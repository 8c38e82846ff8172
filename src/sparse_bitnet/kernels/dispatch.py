"""Which backend serves which weight at which token count, and why.

A weight is prepared once, in every layout that some backend of its device reads:

=========  =============================  ======================  ================================
backend    weight                         bytes a weight          served
=========  =============================  ======================  ================================
reference  int8                           1                       GPUs before sm_80
cpu        two bits, or 1.5 for 2:4       0.25 or 0.19            CPU, unless it was not compiled
dense      int8                           1                       every shape, dense tensor cores
packed     two bits                       0.25                    up to 32 tokens
2:4        compressed                     0.63                    bf16 results, no lifting
windows    compressed                     0.83 (4:6) – 1.2        bf16 results, lifted activations
=========  =============================  ======================  ================================

The choice is by measured time of the whole layer, activation quantization, lifting, scales and bias
included. Dense always takes part, so no choice is slower than it was when measured. Token counts
share a measurement with the next power of two. Inside ``torch.compile`` nothing is measured: the
choice is looked up, while it traces where the token count is known, else when the graph runs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_bitnet.core.activation import quantize_int8
from sparse_bitnet.core.errors import BackendError
from sparse_bitnet.kernels import native, tuning
from sparse_bitnet.kernels.matmul import (
    cpu,
    packed_matmul,
    packed_swiglu,
    structured_matmul,
    ternary_matmul,
)
from sparse_bitnet.kernels.platform import OLDEST_CAPABILITY, capability, has_triton, runs_triton
from sparse_bitnet.kernels.quantize_activations import quantize_fused
from sparse_bitnet.kernels.weight import TernaryWeight

MOST_PACKED_TOKENS = 32
MOST_SWIGLU_TOKENS = 1
"""Up to here a two-bit product takes the SwiGLU that follows it along."""
FEWEST_SPARSE_TOKENS = 256
"""Without a measurement: two-bit rows up to here, sparse tensor cores from there on."""
SPARSE_BACKENDS = ("2:4", "windows")
DRAW = 1.03
"""Times this close are a draw under load; then the dense product serves, which rounds once."""
DEFERRED = " deferred"  # a sparse product without its token scale


@dataclass(frozen=True)
class Choice:
    """A backend and the reason for it."""

    backend: str
    why: str
    microseconds: dict[str, float] = field(default_factory=dict)


def choose(weight: TernaryWeight, tokens: int, out_dtype: torch.dtype = torch.bfloat16) -> Choice:
    """The backend for so many tokens: remembered, else measured if there is room, else by rule."""
    if not runs_triton(weight.w_scale):
        return without_triton(weight.device, weight.packed is not None)
    key = key_of(weight, tokens, out_dtype)
    usable = tuple(backends(weight, tokens, out_dtype))
    index = weight.device.index
    measures = tokens > 0 and len(usable) > 1 and tuning.may_measure_now()
    if measures and tuning.memory(index).get(key) is None:
        from sparse_bitnet.kernels.measure import measure

        with contextlib.suppress(torch.OutOfMemoryError):  # the layer alone may fit
            measure(weight, tokens, out_dtype)
    return _decide(index, key, usable, tokens)


def _decide(
    device_index: int, key: str, usable: tuple[str, ...], tokens: int, deferred: bool = False
) -> Choice:
    """The choice from what is remembered, else by rule.

    ``deferred``: the token scale of a sparse product becomes part of the kernel that reads it.
    """
    if len(usable) == 1:
        return Choice(usable[0], "nothing else serves this weight and dtype")
    remembered = tuning.memory(device_index).get(key) or {}
    times = {name: t for name, t in remembered.items() if name in usable}
    if deferred:
        times = {name: remembered.get(name + DEFERRED, t) for name, t in times.items()}
    if times:
        best = tuning.fastest(times)
        if best in SPARSE_BACKENDS and times.get("dense", math.inf) < DRAW * times[best]:
            best = "dense"
        others = ", ".join(f"{name} {t:.1f}" for name, t in times.items() if name != best)
        return Choice(best, f"measured {times[best]:.1f} µs ({others})", times)
    if tokens <= MOST_PACKED_TOKENS and "packed" in usable:
        return Choice("packed", "few tokens: reading the weight is all the time (not measured)")
    if tokens >= FEWEST_SPARSE_TOKENS and usable[-1] in SPARSE_BACKENDS:
        return Choice(usable[-1], "many tokens: bound by arithmetic (not measured)")
    return Choice("dense", "between the two (not measured)")


@torch.compiler.assume_constant_result
def _decided(device_index: int, key: str, usable: tuple[str, ...], tokens: int) -> str:
    """The choice's name, looked up while ``torch.compile`` traces instead of being traced."""
    return _decide(device_index, key, usable, tokens, deferred=True).backend


def backends(
    weight: TernaryWeight, tokens: int, out_dtype: torch.dtype = torch.bfloat16
) -> list[str]:
    """What could serve this weight; "dense" is always among them on CUDA, elsewhere "reference"."""
    if not runs_triton(weight.w_scale):
        return ["reference"] if weight.packed is None else ["cpu", "reference"]
    names = ["dense"]
    if weight.packed is not None and tokens <= MOST_PACKED_TOKENS:
        names.append("packed")
    if weight.sparse_backend and out_dtype == torch.bfloat16:
        names.append(weight.sparse_backend)
    return names


def ternary_linear(
    x: Tensor,
    weight: TernaryWeight,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
    joins: bool = True,
) -> Tensor:
    """Y = X @ (γT)ᵀ + bias through int8 activations, by the chosen backend.

    Args:
        x: ``[..., in]``, float.
        weight: of :func:`prepare`.
        bias: ``[out]`` or None.
        out_dtype: of the result; ``x.dtype`` if left out.
        backend: use this one instead of the chosen.
        joins: whether a compiler may make X, so that the quantization can join it.

    Returns:
        ``[..., out]``.

    Raises:
        BackendError: if the backend asked for does not serve this weight, dtype or device.
    """
    out_dtype = out_dtype or x.dtype
    tokens = tokens_of(x)
    if backend is None:
        known = _known(weight, tokens)
        if known is None:
            y: Tensor = torch.ops.sparse_bitnet.linear(x.detach(), *parts(weight), bias, out_dtype)
            return y
        backend = _chosen(weight, known, out_dtype)
    elif backend not in backends(weight, tokens, out_dtype):
        raise BackendError(
            f"backend {backend!r} does not serve {tokens} tokens × {weight.pattern} weight "
            f"[{weight.out_features}, {weight.in_features}] → {out_dtype}; choose among "
            f"{backends(weight, tokens, out_dtype)}"
        )
    if backend == "cpu" and weight.packed is not None:
        return cpu.linear(x, weight.packed, weight.layout, weight.w_scale, bias, out_dtype)
    x_q, x_scale = _quantized(x, weight, backend, tokens, joins)
    return _product(x_q, x_scale, weight, bias, out_dtype, backend)


def gated_mlp(
    x: Tensor, gate_up: TernaryWeight, down: TernaryWeight, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Y = down(silu(gate(X)) · up(X)): two quantizations and two products, nothing in between.

    The token scale of a sparse first product, the SwiGLU product and the second quantization (and
    lifting) are one pass over the widest activation of a decoder.

    Args:
        x: ``[..., in]``, float.
        gate_up: ``[2·inner, in]``, the rows of gate before those of up.
        down: ``[out, inner]``.
        out_dtype: of the result and of what lies between; ``x.dtype`` if left out.

    Returns:
        ``[..., out]``.
    """
    out_dtype = out_dtype or x.dtype
    tokens = _known(gate_up, tokens_of(x))
    if tokens is None:
        both = (*parts(gate_up), *parts(down))
        y: Tensor = torch.ops.sparse_bitnet.gated_mlp(x.detach(), *both, out_dtype)
        return y
    first = _chosen(gate_up, tokens, out_dtype, deferred=True)
    if first == "cpu":  # quantizes while it multiplies
        gate, up = ternary_linear(x, gate_up, None, out_dtype).chunk(2, dim=-1)
        return ternary_linear(F.silu(gate) * up, down, None, out_dtype)
    second = _chosen(down, tokens, out_dtype)
    return gated_mlp_by(first, second, x, gate_up, down, out_dtype)


def gated_mlp_by(
    first: str,
    second: str,
    x: Tensor,
    gate_up: TernaryWeight,
    down: TernaryWeight,
    out_dtype: torch.dtype,
) -> Tensor:
    """:func:`gated_mlp` with given backends of its two products; not "cpu"."""
    x_q, x_scale = _quantized(x, gate_up, first, tokens_of(x))
    factor: Tensor | None = None
    if first in SPARSE_BACKENDS:
        y = structured_matmul(x_q, None, cast(Tensor, gate_up.structured), gate_up.w_scale)
        factor = x_scale
    else:
        y = _product(x_q, x_scale, gate_up, None, out_dtype, first)
    y_q, y_scale = quantize_fused(y, swiglu=True, group=_lifting(down, second), factor=factor)
    return _product(y_q, y_scale, down, None, out_dtype, second)


def _quantized(
    x: Tensor, weight: TernaryWeight, backend: str, tokens: int, joins: bool = True
) -> tuple[Tensor, Tensor]:
    """Quantized, and lifted for a sparse product.

    For few tokens a compiler does it, which then makes one kernel of a residual sum, a norm and
    this: launches are what such a kernel costs. For many tokens ours is several times faster.
    """
    group = _lifting(weight, backend)
    few = tokens <= MOST_PACKED_TOKENS
    if torch.compiler.is_compiling() and few and joins and not group:
        return quantize_int8(x)
    return quantize_fused(x, group=group)


def _lifting(weight: TernaryWeight, backend: str) -> int:
    """Lanes of the groups that the backend wants activations lifted in; 0 for none."""
    return weight.group if backend in SPARSE_BACKENDS else 0


def integer_linear(
    x_q: Tensor,
    x_scale: Tensor,
    weight: TernaryWeight,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    residual: Tensor | None = None,
) -> Tensor:
    """Y = (Xq @ (γT)ᵀ) · x_scale + bias, of activations that are integers already.

    Args:
        x_q: int8 ``[..., in]``, of any number of bits up to eight.
        x_scale: float32 ``[..., 1]``.
        weight, bias, out_dtype: as of :func:`ternary_linear`.
        residual: ``[..., out]`` of ``out_dtype``, added to Y once Y has been rounded.

    Returns:
        ``[..., out]``.
    """
    backend = "cpu"  # no choice: bytes are not kept on a CPU
    if weight.rows is not None:
        backend = "dense"
        tokens = _known(weight, tokens_of(x_q)) if runs_triton(weight.w_scale) else None
        if tokens is not None and weight.packed is not None and tokens <= MOST_PACKED_TOKENS:
            key = key_of(weight, tokens, out_dtype)
            backend = _decided(weight.device.index, key, ("dense", "packed"), tokens)
    if backend == "packed" and weight.packed is not None:
        return packed_matmul(x_q, x_scale, weight.packed, weight.w_scale, bias, out_dtype, residual)
    y = _product(x_q, x_scale, weight, bias, out_dtype, backend)
    return y if residual is None else residual + y


def integer_mlp(
    x_q: Tensor,
    x_scale: Tensor,
    gate_up: TernaryWeight,
    down: TernaryWeight,
    out_dtype: torch.dtype,
    residual: Tensor | None = None,
) -> Tensor:
    """:func:`gated_mlp` of activations that are integers already, as :func:`integer_linear`'s."""
    tokens = _known(gate_up, tokens_of(x_q))
    if tokens is not None and 0 < tokens <= MOST_SWIGLU_TOKENS and gate_up.packed is not None:
        y_q, y_scale = packed_swiglu(x_q, x_scale, gate_up.packed, gate_up.w_scale, out_dtype)
    else:
        y = integer_linear(x_q, x_scale, gate_up, None, out_dtype)
        y_q, y_scale = quantize_fused(y, swiglu=True)
    return integer_linear(y_q, y_scale, down, None, out_dtype, residual)


def takes_integers(weights: Sequence[TernaryWeight], x: Tensor) -> bool:
    """Whether products of these weights and few tokens read plain integers, in a compiled graph.

    Then one kernel can make them of a residual sum and its norm (``nn/few_tokens.py``).
    """
    if not torch.compiler.is_compiling() or not runs_triton(x):
        return False
    tokens = _known(weights[0], tokens_of(x))
    if tokens is None or tokens > MOST_PACKED_TOKENS or any(w.packed is None for w in weights):
        return False
    return all(_chosen(w, tokens, x.dtype) not in SPARSE_BACKENDS for w in weights)


def _product(
    x_q: Tensor,
    x_scale: Tensor,
    weight: TernaryWeight,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """The product of quantized (and lifted) activations by a backend."""
    if backend in SPARSE_BACKENDS and weight.structured is not None:
        return structured_matmul(x_q, x_scale, weight.structured, weight.w_scale, bias)
    if backend == "cpu" and weight.packed is not None:
        return cpu.linear(
            x_q, weight.packed, weight.layout, weight.w_scale, bias, out_dtype, x_scale
        )
    if backend == "packed" and weight.packed is not None:
        return packed_matmul(x_q, x_scale, weight.packed, weight.w_scale, bias, out_dtype)
    return ternary_matmul(x_q, x_scale, weight.dense, weight.w_scale, bias, out_dtype)


def _chosen(
    weight: TernaryWeight, tokens: int, out_dtype: torch.dtype, deferred: bool = False
) -> str:
    if not runs_triton(weight.w_scale):
        return "reference" if weight.packed is None else "cpu"
    key, index = key_of(weight, tokens, out_dtype), weight.device.index
    if torch.compiler.is_compiling():
        return _decided(index, key, tuple(backends(weight, tokens, out_dtype)), tokens)
    here = (index, key, deferred)
    have = _decisions.get(here)
    if have is None:
        have = choose(weight, tokens, out_dtype).backend
        if deferred:
            usable = tuple(backends(weight, tokens, out_dtype))
            have = _decide(index, key, usable, tokens, deferred).backend
        if tuning.may_measure():  # a capture takes the rule's word, but only for itself
            _decisions[here] = have
    return have


def remembered(
    weight: TernaryWeight, tokens: int, out_dtype: torch.dtype, deferred: bool = False
) -> str:
    """The choice for a weight on a GPU by what is remembered, else by rule; never measures."""
    usable = tuple(backends(weight, tokens, out_dtype))
    key = key_of(weight, tokens, out_dtype)
    return _decide(weight.device.index, key, usable, tokens, deferred).backend


def tokens_of(x: Tensor) -> int:
    """Rows of ``[..., in]``."""
    return x.numel() // max(1, x.shape[-1])


def parts(weight: TernaryWeight) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int]:
    """What the operators of ``symbolic.py`` take of a weight on a GPU."""
    return weight.w_scale, weight.dense, weight.packed, weight.structured, weight.group


def _known(weight: TernaryWeight, tokens: int) -> int | None:
    """The token count; None where a compiler traces for sizes that it does not know yet."""
    if not torch.compiler.is_compiling() or not runs_triton(weight.w_scale):
        return tokens
    from torch.fx.experimental.symbolic_shapes import guard_scalar, has_static_value

    sizes = (tokens, weight.out_features, weight.in_features)
    if not all(has_static_value(size) for size in sizes):
        return None
    return int(guard_scalar(tokens))  # a symbol with one possible value is not yet a constant


_decisions: dict[tuple[int, str, bool], str] = {}
"""Choices made by this process, by key: token counts of one bucket go one way."""


def key_of(weight: TernaryWeight, tokens: int, out_dtype: torch.dtype) -> str:
    """What a measurement of a layer is remembered under."""
    shape = f"{tuning.bucket(tokens)}x{weight.out_features}x{weight.in_features}"
    layouts = f"{weight.sparse_backend}/{weight.group}/{weight.packed is not None}"
    return f"linear {shape} {layouts} {out_dtype}"


def without_triton(device: torch.device, packed: bool) -> Choice:
    """What serves where Triton does not; ``packed`` if the weight was laid out for the CPU."""
    if packed:
        return Choice("cpu", native.explanation())
    if device.type == "cpu":
        return Choice("reference", native.explanation())
    if device.type != "cuda":
        return Choice("reference", "plain PyTorch integer arithmetic")
    if not has_triton():
        return Choice("reference", "Triton is not installed (pip install triton)")
    have = ".".join(map(str, capability(device.index)))
    need = ".".join(map(str, OLDEST_CAPABILITY))
    return Choice("reference", f"compute capability {have} is below {need}")
