"""One token from its embedding to its logits in one native call, on a CPU.

Module by module, a layer runs some thirty PyTorch operators of a few microseconds around four
products, and Python between them, with caches that the weights have just swept. Here the compiled
library takes the token through all layers, the last norm and the head, over the same weights and
the same key-value cache.

Results are those of the modules up to the order of float sums: values are rounded to the model's
dtype where the modules round, but probabilities of attention are kept in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparse_bitnet.kernels import native
from sparse_bitnet.kernels.native.layer import (
    HEAD_MULTIPLE,
    LARGEST_HEAD,
    LayerCall,
    TokenCall,
)
from sparse_bitnet.modeling.cache import GrowingLayer
from sparse_bitnet.modeling.layers import Head
from sparse_bitnet.nn.int8_head import Int8Head, TiedInt8Head

if TYPE_CHECKING:
    from sparse_bitnet.modeling.decoder import Decoder, DecoderLayer


INDEPENDENT = ("default", "linear", "llama3", "yarn")
"""Kinds of rotation whose angles at one position do not depend on the length of the text."""
POSITIONS = 64
"""Computed at once: PyTorch's operators take as long for one."""


class NativeToken:
    """The prepared call of a decoder and its head.

    The call holds addresses. It is prepared again when a weight was replaced or has moved, when
    the number of threads changes, or the path of the library; a copy of a model prepares its own.
    Modules are those of the first token: walking through them anew takes a millisecond.
    """

    def __init__(self, decoder: Decoder, head: nn.Module) -> None:
        self._decoder, self._head = decoder, head
        self._forget()

    def _forget(self) -> None:
        self._modules: tuple[list[Any], list[Any]] | None = None
        self._prepared_for: list[Any] = []
        self._rotary_for: Any = None
        self.call: TokenCall | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_decoder": self._decoder, "_head": self._head}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __call__(
        self, input_ids: Any, inputs_embeds: Any, mask: Any, position_ids: Any, cache: Any
    ) -> Tensor | None:
        """Logits ``[1, 1, vocabulary]`` of one token, which the cache grows by.

        Args:
            input_ids, inputs_embeds: one of them ``[1, 1]`` or ``[1, 1, hidden]``, the other None.
            mask: of the tokens so far, ``[1, tokens]`` with 0 where one is padding, or None.
            position_ids: ``[1, 1]``, or None.
            cache: of the model.

        Returns:
            None where the library does not serve: other shapes, devices, dtypes and caches,
            padding, compilation, autocast, gradients. Then nothing has changed.
        """
        given = inputs_embeds if input_ids is None else input_ids
        layers = getattr(cache, "layers", [])
        if (
            torch.compiler.is_compiling()
            or given is None
            or (input_ids is not None and inputs_embeds is not None)
            or given.shape[:2] != (1, 1)
            or given.device.type != "cpu"
            or torch.is_autocast_enabled("cpu")
            or (torch.is_grad_enabled() and given.requires_grad)
            or len(layers) != len(self._decoder.layers)
            or not all(isinstance(one, GrowingLayer) and one.is_initialized for one in layers)
        ):
            return None
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2 and mask.all()):
            return None
        x = self._decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        seen, shape = layers[0].get_seq_length(), layers[0].buffer_shape()
        if (
            x.dtype not in native.TYPES
            or shape[0] != 1
            or any(
                one.dtype != x.dtype or one.get_seq_length() != seen or one.buffer_shape() != shape
                for one in layers
            )
        ):
            return None
        self._prepare(x.dtype)
        if self.call is None:
            return None
        cosine, sine = self._rotary(x, seen if position_ids is None else int(position_ids))
        if not (
            cosine.dtype == sine.dtype == x.dtype
            and cosine.numel() == sine.numel() == self.call.head_dim
        ):
            return None
        buffers = [one.reserve(1) for one in layers]
        y = self.call(x.contiguous(), cosine, sine, buffers, seen)
        for one in layers:
            one.extend(1)
        return y

    def _prepare(self, dtype: torch.dtype) -> None:
        """Rebuild the call if any of its inputs has changed."""
        layers: Any = self._decoder.layers
        if self._modules is None:
            norms = [*(norm for layer in layers for norm in _norms(layer)), self._decoder.norm]
            self._modules = [one for layer in layers for one in layer.linears()], norms
        linears, norms = self._modules
        weights = [linear.prepared("weight") for linear in linears]
        head = _head(self._head)
        # A parameter or bias may be given other memory and stay the same object.
        prepared_for = [
            dtype,
            torch.get_num_threads(),
            native.path(),
            *map(id, weights),  # the call keeps them, so ids are not used again
            *(_address(one._buffers["bias"]) for one in linears),
            *(_address(norm._parameters["weight"]) for norm in norms),
            *map(_address, head),
        ]
        if prepared_for == self._prepared_for:
            return
        self._prepared_for, self.call = prepared_for, None
        weight, scale, bias = head
        if (
            all(_is_served(layer) for layer in layers)
            and all(one.backend == "native" for one in weights)
            and all(_is_plain(norm.weight, dtype) for norm in norms)
            and weight is not None
            and _is_plain(weight, dtype if scale is None else torch.int8)
        ):
            norm = self._decoder.norm
            self.call = TokenCall(
                [_layer_call(layer) for layer in layers],
                norm.weight,
                norm.epsilon,
                weight,
                scale,
                None if bias is None else bias.contiguous(),
                dtype,
            )

    def _rotary(self, x: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine ``[head_dim]``: rows of a table where a position's depend on no other."""
        module: Any = self._decoder.rotary_emb
        if getattr(module, "rope_type", None) not in INDEPENDENT:
            cosine, sine = module(x, torch.tensor([[position]]))
            return cosine.flatten(), sine.flatten()
        first = position - position % POSITIONS
        table_for = (x.dtype, first, module.inv_freq.data_ptr())
        if self._rotary_for != table_for:
            positions = torch.arange(first, first + POSITIONS).unsqueeze(0)
            self._table, self._rotary_for = module(x, positions), table_for
        cosine, sine = self._table
        return cosine[0, position - first], sine[0, position - first]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _is_plain(weight: Tensor, dtype: torch.dtype) -> bool:
    return weight.dtype == dtype and weight.device.type == "cpu" and weight.is_contiguous()


def _head(head: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Weight, scale and bias; no weight for a head that the library does not multiply with."""
    table = head.table if isinstance(head, TiedInt8Head) else head
    if isinstance(head, Int8Head | TiedInt8Head):
        return table.weight, table.weight_scale, table.bias
    return (head.weight, None, head.bias) if type(head) is Head else (None, None, None)


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


def _layer_call(layer: DecoderLayer) -> LayerCall:
    attention, norms = layer.self_attn, _norms(layer)
    weights = [norm.weight for norm in norms]
    return LayerCall(
        [
            (one.prepared("weight"), None if one.bias is None else one.bias.contiguous())
            for one in layer.linears()
        ],
        (weights[0], weights[1]),
        (norms[0].epsilon, norms[1].epsilon),
        (weights[2], weights[3]) if len(norms) > 2 else None,
        norms[2].epsilon if len(norms) > 2 else 0.0,
        (attention.heads, attention.kv_heads),
        attention.head_dim,
        attention.scaling,
    )
