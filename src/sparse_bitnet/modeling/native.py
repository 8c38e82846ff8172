"""One token through all layers of a decoder in one native call, on a CPU.

Module by module, a layer runs some thirty PyTorch operators of a few microseconds around four
products, and Python between them, with caches that the weights have just swept. Here the compiled
library takes the token through all layers, over the same weights and the same key-value cache.

Results are those of the modules up to the order of float sums: values are rounded to the model's
dtype where the modules round, but probabilities of attention are kept in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_bitnet.kernels import native
from sparse_bitnet.kernels.native.layer import (
    HEAD_MULTIPLE,
    LARGEST_HEAD,
    LayerCall,
    StackCall,
)
from sparse_bitnet.modeling.cache import GrowingLayer

if TYPE_CHECKING:
    from sparse_bitnet.modeling.decoder import DecoderLayer


class NativeLayers:
    """Layers of a decoder, and the prepared call of all of them.

    The call holds addresses. It is prepared again when a weight was replaced or has moved, when
    the number of threads changes, or the path of the library; a copy of a decoder prepares its own.
    """

    def __init__(self, layers: list[DecoderLayer]) -> None:
        self._layers = layers
        self._prepared_for: list[Any] = []
        self.call: StackCall | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prepared_for": [], "call": None}

    def __call__(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Any, cache: Any
    ) -> Tensor | None:
        """The last layer's output for one token, which the cache grows by.

        Args:
            x: ``[1, 1, hidden]``.
            rotary: cosine and sine of its position.
            mask: of the tokens so far, ``[1, tokens]`` with 0 where one is padding, or None.
            cache: of the model.

        Returns:
            None where the library does not serve: other shapes, devices, dtypes and caches,
            padding, compilation, autocast, gradients. Then nothing has changed.
        """
        cosine, sine = rotary
        if (
            torch.compiler.is_compiling()
            or x.shape[:2] != (1, 1)
            or x.device.type != "cpu"
            or x.dtype not in native.TYPES
            or torch.is_autocast_enabled("cpu")
            or (torch.is_grad_enabled() and x.requires_grad)
            or not cosine.dtype == sine.dtype == x.dtype
            or not cosine.numel() == sine.numel() == self._layers[0].self_attn.head_dim
        ):
            return None
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2 and mask.all()):
            return None
        layers = getattr(cache, "layers", [])
        if len(layers) != len(self._layers) or not all(_can_extend(one, x.dtype) for one in layers):
            return None
        shape = layers[0].keys.shape
        if shape[0] != 1 or any(one.keys.shape != shape for one in layers):
            return None
        self._prepare(x.dtype)
        if self.call is None:
            return None
        buffers = [one.reserve(1) for one in layers]
        y = self.call(x.contiguous(), cosine.contiguous(), sine.contiguous(), buffers, shape[2])
        for one in layers:
            one.extend(1)
        return y

    def _prepare(self, dtype: torch.dtype) -> None:
        """Rebuild the call if any of its inputs has changed."""
        linears = [linear for layer in self._layers for linear in layer.linears()]
        weights = [linear.layout("weight") for linear in linears]
        norms = [norm for layer in self._layers for norm in _norms(layer)]
        # A parameter or bias may be given other memory and stay the same object.
        prepared_for = [
            dtype,
            torch.get_num_threads(),
            native.path(),
            *(id(weight) for weight in weights),  # the call keeps them, so ids are not used again
            *(0 if one.bias is None else one.bias.data_ptr() for one in linears),
            *(norm.weight.data_ptr() for norm in norms),
        ]
        if prepared_for == self._prepared_for:
            return
        self._prepared_for, self.call = prepared_for, None
        if (
            all(_is_served(layer) for layer in self._layers)
            and all(weight.backend == "native" for weight in weights)
            and all(
                norm.weight.dtype == dtype
                and norm.weight.device.type == "cpu"
                and norm.weight.is_contiguous()
                for norm in norms
            )
        ):
            self.call = StackCall([_layer_call(layer, dtype) for layer in self._layers])


def _can_extend(layer: Any, dtype: torch.dtype) -> bool:
    return isinstance(layer, GrowingLayer) and layer.is_initialized and layer.dtype == dtype


def _is_served(layer: DecoderLayer) -> bool:
    """True if the library computes such a layer: SwiGLU, no window, heads of certain sizes."""
    attention = layer.self_attn
    return (
        layer.is_packed
        and layer.mlp.is_silu
        and attention.sliding_window is None
        and attention.head_dim % HEAD_MULTIPLE == 0
        and attention.head_dim <= LARGEST_HEAD
    )


def _norms(layer: DecoderLayer) -> list[Any]:
    """Of attention, of the MLP, and of each query and key head where there are such."""
    both = [layer.input_layernorm, layer.post_attention_layernorm]
    return both + [one for one in (layer.self_attn.q_norm, layer.self_attn.k_norm) if one]


def _layer_call(layer: DecoderLayer, dtype: torch.dtype) -> LayerCall:
    attention, norms = layer.self_attn, _norms(layer)
    weights = [norm.weight for norm in norms]
    return LayerCall(
        [
            (one.layout("weight"), None if one.bias is None else one.bias.contiguous())
            for one in layer.linears()
        ],
        (weights[0], weights[1]),
        (norms[0].epsilon, norms[1].epsilon),
        (weights[2], weights[3]) if len(norms) > 2 else None,
        norms[2].epsilon if len(norms) > 2 else 0.0,
        (attention.heads, attention.kv_heads),
        attention.head_dim,
        attention.scaling,
        dtype,
    )
