"""Backward of a gated MLP, Y = down(silu(gate(X))·up(X)), from what its forward kept."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_bitnet.kernels import swiglu
from sparse_bitnet.kernels.backward import fp8, gradients


class Layer(NamedTuple):
    """One of the three ternary layers, of one γ."""

    ternary: Tensor
    """int8 ``[out, in]``."""
    w_scale: Tensor
    """float32 ``[out]``, γ of every row: the same."""
    dtype: torch.dtype
    """Of its dW."""


class Kept(NamedTuple):
    """What forward kept: integers and steps of X, gate and up, integers and steps of their product.

    Shapes: ``[..., in]``, ``[..., 1]``, twice ``[..., inner]``, ``[..., inner]``, ``[..., 1]``.
    """

    x_q: Tensor
    x_scale: Tensor
    gate: Tensor
    up: Tensor
    h_q: Tensor
    h_scale: Tensor


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def gated_gradients(
    dy: Tensor,
    kept: Kept,
    gate: Layer,
    up: Layer,
    down: Layer,
    *,
    use_fp8: bool,
    needs: tuple[bool, bool, bool, bool],
    x_dtype: torch.dtype,
) -> Gradients:
    """dX and the three dW, each as :func:`sparse_bitnet.kernels.backward.gradients` has it.

    Args:
        dy: ``[..., out]``, of gate's and up's dtype.
        use_fp8: run the six products in e4m3 where the sizes allow.
        needs: whether dX, dW of gate, of up and of down are wanted.
        x_dtype: of dX; its two parts are summed in it, as autograd sums them.

    Returns:
        dX ``[..., in]`` and the dW; None for what is not wanted.
    """
    tokens = dy.numel() // max(1, dy.shape[-1])
    run = _in_fp8 if use_fp8 and fp8.serves(tokens, *down.ternary.shape) else _plain
    return run(dy, kept, gate, up, down, needs, x_dtype)


def _plain(
    dy: Tensor,
    kept: Kept,
    gate: Layer,
    up: Layer,
    down: Layer,
    needs: tuple[bool, bool, bool, bool],
    x_dtype: torch.dtype,
) -> Gradients:
    needs_x, needs_gate, needs_up, needs_down = needs
    wanted = needs_x or needs_gate or needs_up, needs_down
    dh, dw_down = _of(dy, kept.h_q, kept.h_scale, down, wanted)
    dx = dw_gate = dw_up = None
    if dh is not None:
        d_gate, d_up = swiglu.gradients(dh, kept.gate, kept.up)
        x = kept.x_q, kept.x_scale
        dx_gate, dw_gate = _of(d_gate, *x, gate, (needs_x, needs_gate))
        dx_up, dw_up = _of(d_up, *x, up, (needs_x, needs_up))
        if dx_gate is not None and dx_up is not None:
            dx = dx_gate.to(x_dtype) + dx_up.to(x_dtype)
    return dx, dw_gate, dw_up, dw_down


def _of(
    dy: Tensor, x_q: Tensor, x_scale: Tensor, layer: Layer, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    operands = x_q, x_scale, layer.ternary, layer.w_scale
    return gradients(dy, *operands, one_scale=True, needs=needs, weight_dtype=layer.dtype)


def _in_fp8(
    dy: Tensor,
    kept: Kept,
    gate: Layer,
    up: Layer,
    down: Layer,
    needs: tuple[bool, bool, bool, bool],
    x_dtype: torch.dtype,
) -> Gradients:
    """d gate and d up come as e4m3 rows and are never written in another form."""
    needs_x, needs_gate, needs_up, needs_down = needs
    dy = dy.reshape(-1, dy.shape[-1])
    x_q, _, gate_rows, up_rows, h_q, _ = (t.reshape(-1, t.shape[-1]) for t in kept)
    values, scale = fp8.rows(dy, None)
    dw_down = dx = None
    if needs_down:
        dw_down = fp8.weight_gradient(values, scale, h_q, kept.h_scale).to(down.dtype)
    dw: list[Tensor | None] = [None, None]
    if needs_x or needs_gate or needs_up:
        dh = fp8.unscaled_input_gradient(values, down.ternary, dy.dtype)
        factor = scale * down.w_scale.select(0, 0)
        results = swiglu.fp8_gradients(dh, factor, gate_rows, up_rows)
        for i, (layer, needs_w) in enumerate(((gate, needs_gate), (up, needs_up))):
            values, scale = results[2 * i], results[2 * i + 1]
            if needs_x:
                product = fp8.unscaled_input_gradient(values, layer.ternary, dy.dtype)
                part = product * (scale * layer.w_scale.select(0, 0)).unsqueeze(-1)
                part = part.to(x_dtype)
                dx = part if dx is None else dx + part
            if needs_w:
                dw[i] = fp8.weight_gradient(values, scale, x_q, kept.x_scale).to(layer.dtype)
    if dx is not None:
        dx = dx.reshape(kept.x_q.shape)
    return dx, dw[0], dw[1], dw_down
