"""SparseBitLinear: the method as one linear layer and its autograd function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_bitnet.core import ConfigError, quantize_int8, row_scale
from sparse_bitnet.kernels import compiled, quantize_activations, ternary_matmul
from sparse_bitnet.kernels.backward import gradients
from sparse_bitnet.kernels.matmul import unpacked
from sparse_bitnet.nn.blend import blended_linear
from sparse_bitnet.nn.derived import DerivedModule
from sparse_bitnet.nn.sparse_linear import ConvertedLinear, masked_weight


class BitProduct(torch.autograd.Function):
    """Y = γ·(Xq @ Tᵀ)·x_scale forward; dual straight-through estimator backward.

    Rounding and mask are the identity for gradients, so with X ≈ x_scale·Xq

        dX = dY @ (γT)        dW = dYᵀ @ (x_scale·Xq)

    and dW is not masked: a weight that the mask removed keeps learning and can come back. The int8
    activations are what is kept for backward, half the memory of bf16; compiled, they may be made
    again from what is kept anyway (:mod:`sparse_bitnet.kernels.compiled`, also for how integers
    then differ). Products run in dY's dtype, or in fp8
    (:mod:`sparse_bitnet.kernels.backward.fp8`). The master weight takes part only to receive its
    gradient. There are no second derivatives: asking for them is an error.

    Source: section 3 of arXiv 2603.05168.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ternary: Tensor,
        w_scale: Tensor,
        kept: Tensor | None,
        bits: int,
        out_dtype: torch.dtype,
        one_scale: bool = False,
        fp8: bool = False,
    ) -> Tensor:
        x_q, x_scale = quantized(x, bits)
        ctx.save_for_backward(x_q, x_scale, ternary, w_scale, kept)
        ctx.one_scale, ctx.fp8 = one_scale, fp8
        ctx.x_dtype, ctx.w_dtype = x.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return ternary_matmul(x_q, x_scale, ternary, w_scale, bias, out_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (dy,) = grads
        x_q, x_scale, ternary, w_scale, kept = ctx.saved_tensors
        needs_x, needs_w, needs_bias = ctx.needs_input_grad[:3]
        dx, dw = gradients(
            dy,
            x_q,
            x_scale,
            unpacked(ternary, x_q.shape[-1]),
            w_scale,
            one_scale=ctx.one_scale,
            use_fp8=ctx.fp8,
            needs=(needs_x, needs_w),
            weight_dtype=ctx.w_dtype,
        )
        dbias = None
        dx = None if dx is None else dx.to(ctx.x_dtype)
        if dw is not None and kept is not None:
            dw = dw * kept
        if needs_bias:
            at_least_float = torch.promote_types(dy.dtype, torch.float32)
            dbias = dy.reshape(-1, dy.shape[-1]).sum(0, dtype=at_least_float).to(ctx.bias_dtype)
        return dx, dw, dbias, *[None] * 7


def quantized(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Integers and step of each token, by a kernel or left to the compiler."""
    if bits == 8 and compiled.takes_rows(x.shape[-1]):
        return quantize_int8(x)
    return quantize_activations(x, bits)


def output_dtype(x: Tensor) -> torch.dtype:
    """What a linear layer would return for ``x``: autocast's dtype where that is on.

    Raises:
        ConfigError: for integers, which a model makes of its activations where it casts them to the
            dtype of a weight, and that weight is packed.
    """
    if not x.is_floating_point():
        raise ConfigError(
            f"a layer got activations of {x.dtype}; this architecture casts them to the dtype of "
            "the layer's weight, so that layer has to stay in floating point: the output head with "
            "--head float when packing, another one with a rule that skips it when converting"
        )
    device = x.device.type
    # The meta device has no autocast to ask for. (`is_autocast_available` would say so, but breaks
    # the graph of torch 2.11.)
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def ternary_product(
    module: DerivedModule,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ternary: Tensor,
    rows: Tensor,
    kept: Tensor | None,
    one_scale: bool,
) -> Tensor:
    """The product of one matrix of a ternary module, by its method and at its λ.

    Args:
        x: ``[..., in]``.
        weight: the master weight ``[out, in]``, which gets the gradient.
        bias: ``[out]`` or None.
        ternary, kept: of :meth:`DerivedModule.derived`.
        rows: γ of each row, ``[out]``.
        one_scale: they are all the same.
    """
    dtype, method = output_dtype(x), module.method
    if module.blend is not None:
        weight = masked_weight(module, weight, kept)
        return blended_linear(x, weight, bias, ternary, rows, method.activation_bits, module.blend)
    fp8 = method.backward == "fp8"
    return BitProduct.apply(
        x, weight, bias, ternary, rows, kept, method.activation_bits, dtype, one_scale, fp8
    )


class SparseBitLinear(ConvertedLinear):
    """``nn.Linear`` with ternary N:M weights and integer activations, trained through both.

    ``weight`` (and ``bias``) are ordinary parameters and all that it holds. The ternary weight is
    derived from the master weight in every forward; see :mod:`sparse_bitnet.nn.derived`.

    Shapes: ``[..., in]`` → ``[..., out]``, in autocast's dtype if enabled, else the input's.
    """

    is_ternary = True

    def forward(self, x: Tensor) -> Tensor:
        ternary, scale, kept = self.derived()
        assert ternary is not None and scale is not None
        rows = row_scale(scale, self.shard_sizes, self.out_features)
        one_scale = len(self.shard_sizes) < 2
        return ternary_product(self, x, self.weight, self.bias, ternary, rows, kept, one_scale)
