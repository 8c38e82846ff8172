"""Tokens of several sequences from their embeddings to their logits in one call of the library.

A token of a small model takes a dozen milliseconds, of which reading the weights is the larger
part only if nothing else costs much: run module by module, a layer's norms, rotation, attention and
sums cost as much again in calls of PyTorch operators. Tokens of several sequences share the weights
and nothing else: each has its own place in a cache, and its results are those that it has alone.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_bitnet.kernels import native
from sparse_bitnet.kernels.registry import TernaryWeight

HEAD_MULTIPLE, LARGEST_HEAD = 16, 256


class _Linear(ctypes.Structure):
    """``Linear`` in native.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("x", "x_type", "x_stride", "x_scale")),
        *((name, ctypes.c_int64) for name in ("weight", "layout", "stride", "w_scale")),
        *((name, ctypes.c_int64) for name in ("bias", "bias_type", "y", "y_type", "tokens")),
        *((name, ctypes.c_int64) for name in ("in_features", "out_features", "threads", "path")),
    ]


class _Layer(ctypes.Structure):
    """``Layer`` in native.h."""

    _fields_ = [
        *((name, _Linear) for name in ("qkv", "o", "gate_up", "down")),
        *((name, ctypes.c_int64) for name in ("norm", "mlp_norm")),
        *((name, ctypes.c_double) for name in ("epsilon", "mlp_epsilon")),
        *((name, ctypes.c_int64) for name in ("q_norm", "k_norm")),
        ("qk_epsilon", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("keys", "values", "token_stride", "head_stride")),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "head_dim")),
        ("scaling", ctypes.c_double),
        ("type", ctypes.c_int64),
    ]


class _Row(ctypes.Structure):
    """``Row`` in native.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("seen", "first", "places", "cosine", "sine")]


class _Step(ctypes.Structure):
    """``Step`` in native.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("layers", "count", "rows", "tokens")),
        *((name, ctypes.c_int64) for name in ("x", "y", "type", "norm")),
        ("epsilon", ctypes.c_double),
        ("threads", ctypes.c_int64),
        ("head", _Linear),
    ]


@dataclass(frozen=True)
class Row:
    """One token of a step: its place in its sequence, and the tokens that it sees in the cache.

    Attributes:
        seen: tokens of its sequence so far, this one included.
        first: place of the sequence's first token in the cache, where the others follow it.
        places: address of int64 ``[seen]``, the place of each; 0 where they follow the first.
    """

    seen: int
    first: int = 0
    places: int = 0


class LayerCall:
    """What a call of a decoder layer of the Llama family is made of.

    All tensors are on the CPU, contiguous and of the model's dtype unless said otherwise. The
    weights are used where they are: an object of this class keeps them alive, and sees what is
    written to them.

    Args:
        products: (weight, bias or None) of q/k/v joined, o, gate/up joined, and down.
        norms: RMSNorm weights before attention and before the MLP, ``[hidden]``.
        epsilons: of both.
        head_norms: RMSNorm weights of each query and key head, ``[head_dim]``; None without.
        head_epsilon: of both.
        heads: of queries and of keys.
        head_dim: a multiple of 16, at most 256.
        scaling: of the scores.
    """

    def __init__(
        self,
        products: list[tuple[TernaryWeight, Tensor | None]],
        norms: tuple[Tensor, Tensor],
        epsilons: tuple[float, float],
        head_norms: tuple[Tensor, Tensor] | None,
        head_epsilon: float,
        heads: tuple[int, int],
        head_dim: int,
        scaling: float,
    ) -> None:
        self.head_dim, self._alive = head_dim, (products, norms, head_norms)
        self._call = call = _Layer()
        for linear, (weight, bias) in zip(
            (call.qkv, call.o, call.gate_up, call.down), products, strict=True
        ):
            _fill(linear, weight.packed, weight.layout, weight.w_scale, bias)
            linear.in_features, linear.out_features = weight.in_features, weight.out_features
        call.norm, call.mlp_norm = (norm.data_ptr() for norm in norms)
        call.epsilon, call.mlp_epsilon = epsilons
        if head_norms is not None:
            call.q_norm, call.k_norm = (norm.data_ptr() for norm in head_norms)
            call.qk_epsilon = head_epsilon
        (call.heads, call.kv_heads), call.head_dim = heads, head_dim
        call.scaling = scaling


def _fill(
    linear: _Linear, weight: Tensor, layout: str, w_scale: Tensor | None, bias: Tensor | None
) -> None:
    linear.weight, linear.stride = weight.data_ptr(), weight.stride(0) * weight.element_size()
    linear.layout = native.LAYOUTS.index(layout)
    linear.w_scale = 0 if w_scale is None else w_scale.data_ptr()
    if bias is not None:
        linear.bias, linear.bias_type = bias.data_ptr(), native.TYPES[bias.dtype]
    linear.path = native.PATHS.index(native.path())


class StepCall:
    """Layers that follow each other, the last norm and the head; called from several threads too.

    Args:
        layers: at least one; of the same shapes.
        norm, epsilon: of the last RMSNorm.
        head: weight ``[vocabulary, hidden]``, int8 or of ``dtype``.
        head_scale: float32 ``[vocabulary]`` of an int8 head, else None.
        head_bias: ``[vocabulary]`` or None.
        dtype: float32, bfloat16 or float16.
    """

    def __init__(
        self,
        layers: list[LayerCall],
        norm: Tensor,
        epsilon: float,
        head: Tensor,
        head_scale: Tensor | None,
        head_bias: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self._alive, self._array = (layers, norm, head, head_scale, head_bias), _Layer * len(layers)
        self._layers = self._array(*(layer._call for layer in layers))
        self.head_dim = layers[0].head_dim
        self._step = step = _Step()
        step.count, step.type, step.threads = (
            len(layers),
            native.TYPES[dtype],
            torch.get_num_threads(),
        )
        step.norm, step.epsilon = norm.data_ptr(), epsilon
        layout = "bytes" if head.dtype == torch.int8 else str(dtype).removeprefix("torch.")
        _fill(step.head, head, layout, head_scale, head_bias)
        step.head.out_features, step.head.in_features = head.shape

    def __call__(
        self,
        x: Tensor,
        rows: list[Row],
        rotary: tuple[Tensor, Tensor],
        caches: list[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Logits ``[tokens, vocabulary]`` of embeddings ``[tokens, hidden]``.

        Args:
            rows: of each token; its keys and values are written at its last place.
            rotary: cosine and sine of each token's position, ``[tokens, head_dim]``.
            caches: keys and values of each layer, ``[sequences or pages, key heads, tokens,
                head_dim]``, dense in the last dimension and of the same strides.
        """
        if not rows:
            return x.new_empty(0, self._step.head.out_features)
        step = _Step.from_buffer_copy(self._step)
        layers = self._array.from_buffer_copy(self._layers)
        y = x.new_empty(len(rows), step.head.out_features)
        for layer, (keys, values) in zip(layers, caches, strict=True):
            layer.keys, layer.values = keys.data_ptr(), values.data_ptr()
            _, layer.head_stride, layer.token_stride, _ = keys.stride()
        cosines, sines = (one.contiguous() for one in rotary)
        size = self.head_dim * x.element_size()
        each = (_Row * len(rows))()
        for index, row in enumerate(rows):
            cosine, sine = (one.data_ptr() + index * size for one in (cosines, sines))
            each[index] = _Row(row.seen, row.first, row.places, cosine, sine)
        step.layers, step.rows = ctypes.addressof(layers), ctypes.addressof(each)
        step.tokens, step.x, step.y = len(rows), x.data_ptr(), y.data_ptr()
        native.run_step(step)
        return y
