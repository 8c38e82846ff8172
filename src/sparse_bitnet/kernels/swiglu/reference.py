"""SwiGLU between the products of a training step, step by step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_bitnet.core.activation import quantize_int8
from sparse_bitnet.kernels.backward.reference import fp8_rows


def quantize(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """silu(gate)·up, rounded where the modules round, → int8 and its step for each token.

    Args:
        gate, up: ``[..., inner]`` of one dtype.

    Returns:
        int8 ``[..., inner]`` and float32 ``[..., 1]``.
    """
    return quantize_int8(F.silu(gate.detach()) * up.detach())


def gradients(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(d gate, d up) in their dtype, rounded where autograd rounds.

    Args:
        dh: gradient of silu(gate)·up, of their shape and dtype.
    """
    d_up = dh * F.silu(gate)
    d_gate: Tensor = torch.ops.aten.silu_backward(dh * up, gate)
    return d_gate, d_up


def fp8_gradients(
    dh: Tensor, factor: Tensor, gate: Tensor, up: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same as e4m3 rows, each with its power of two; computed in float32.

    Args:
        dh: ``[tokens, inner]``, still to be multiplied by ``factor``.
        factor: float32 ``[tokens]``.
        gate, up: ``[tokens, inner]``.

    Returns:
        e4m3 ``[tokens, inner]`` and float32 ``[tokens]`` of d gate, then those of d up; see
        :func:`sparse_bitnet.kernels.backward.reference.fp8_rows`.
    """
    full, g = dh.float() * factor.unsqueeze(-1), gate.float()
    sigmoid = torch.sigmoid(g)
    silu = g * sigmoid
    d_gate = full * up.float() * (sigmoid + silu * (1.0 - sigmoid))
    return (*fp8_rows(d_gate, None), *fp8_rows(full * silu, None))
