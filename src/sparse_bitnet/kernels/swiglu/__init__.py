"""SwiGLU between the products of a gated MLP in training, with what follows in the same pass.

    forward      silu(gate)·up      → int8, one step a token
    backward     d gate, d up       → e4m3, one power of two a token; or in their own dtype

Short rows are left to the compiler (:mod:`sparse_bitnet.kernels.compiled`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bitnet.kernels import compiled
from sparse_bitnet.kernels.backward.fp8 import has_kernels
from sparse_bitnet.kernels.backward.reference import FP8
from sparse_bitnet.kernels.library import register
from sparse_bitnet.kernels.platform import runs_triton
from sparse_bitnet.kernels.swiglu import reference
from sparse_bitnet.kernels.swiglu.reference import gradients

__all__ = ["fp8_gradients", "gradients", "quantize"]


def quantize(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """int8 of silu(gate)·up and its step; arguments and results of the reference."""
    if compiled.takes_rows(gate.shape[-1]) or not runs_triton(gate):
        return reference.quantize(gate, up)
    quantized, scale = torch.ops.sparse_bitnet.swiglu_quantize(gate, up)
    return quantized, scale


def fp8_gradients(
    dh: Tensor, factor: Tensor, gate: Tensor, up: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """e4m3 of d gate and d up; arguments and results of the reference."""
    if compiled.takes_rows(gate.shape[-1]) or not has_kernels(gate):
        return reference.fp8_gradients(dh, factor, gate, up)
    d_gate, gate_scale, d_up, up_scale = torch.ops.sparse_bitnet.swiglu_fp8_gradients(
        dh, factor, gate, up
    )
    return d_gate, gate_scale, d_up, up_scale


def _cuda_quantize(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    from sparse_bitnet.kernels.swiglu import triton

    return triton.quantize(gate, up)


def _cuda_fp8_gradients(
    dh: Tensor, factor: Tensor, gate: Tensor, up: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sparse_bitnet.kernels.swiglu import triton

    return triton.fp8_gradients(dh, factor, gate, up)


def _fake_fp8_gradients(
    dh: Tensor, factor: Tensor, gate: Tensor, up: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, scale = gate.new_empty(gate.shape, dtype=FP8), torch.empty_like(factor)
    return rows, scale, torch.empty_like(rows), torch.empty_like(factor)


register(
    "swiglu_quantize(Tensor gate, Tensor up) -> (Tensor, Tensor)",
    _cuda_quantize,
    lambda gate, up: (
        gate.new_empty(gate.shape, dtype=torch.int8),
        gate.new_empty((*gate.shape[:-1], 1), dtype=torch.float32),
    ),
)
register(
    "swiglu_fp8_gradients(Tensor dh, Tensor factor, Tensor gate, Tensor up) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _cuda_fp8_gradients,
    _fake_fp8_gradients,
)
