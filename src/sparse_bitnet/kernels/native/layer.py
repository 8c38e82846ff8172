"""One token through decoder layers in one call of the library.

A token of a small model takes a dozen milliseconds, of which reading the weights is the larger
part only if nothing else costs much: run module by module, a layer's norms, rotation, attention and
sums cost as much again in calls of PyTorch operators.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sparse_bitnet.kernels import native
from sparse_bitnet.kernels.registry import TernaryWeight

HEAD_MULTIPLE, LARGEST_HEAD = 16, 256


class _Linear(ctypes.Structure):
    """``Linear`` in native.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("x", "x_type", "x_stride", "x_scale")),
        *((name, ctypes.c_int64) for name in ("weight", "layout", "row_bytes", "w_scale")),
        *((name, ctypes.c_int64) for name in ("bias", "bias_type", "y", "y_type", "tokens")),
        *((name, ctypes.c_int64) for name in ("in_features", "out_features", "threads", "path")),
    ]


class _Layer(ctypes.Structure):
    """``Layer`` in native.h."""

    _fields_ = [
        *((name, _Linear) for name in ("qkv", "o", "gate_up", "down")),
        *((name, ctypes.c_int64) for name in ("x", "y", "type", "norm", "mlp_norm")),
        *((name, ctypes.c_double) for name in ("epsilon", "mlp_epsilon")),
        *((name, ctypes.c_int64) for name in ("q_norm", "k_norm")),
        ("qk_epsilon", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("cosine", "sine", "keys", "values", "kv_stride")),
        *((name, ctypes.c_int64) for name in ("position", "heads", "kv_heads", "head_dim")),
        ("scaling", ctypes.c_double),
    ]


class LayerCall:
    """What a call of a decoder layer of the Llama family is made of.

    All tensors are on the CPU, contiguous and of ``dtype`` unless said otherwise. The weights are
    used where they are: an object of this class keeps them alive, and sees what is written to them.

    Args:
        products: (weight, bias or None) of q/k/v joined, o, gate/up joined, and down.
        norms: RMSNorm weights before attention and before the MLP, ``[hidden]``.
        epsilons: of both.
        head_norms: RMSNorm weights of each query and key head, ``[head_dim]``; None without.
        head_epsilon: of both.
        heads: of queries and of keys.
        head_dim: a multiple of 16, at most 256.
        scaling: of the scores.
        dtype: float32, bfloat16 or float16.
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
        dtype: torch.dtype,
    ) -> None:
        self.dtype, self._alive = dtype, (products, norms, head_norms)
        self._call = call = _Layer()
        for linear, (weight, bias) in zip(
            (call.qkv, call.o, call.gate_up, call.down), products, strict=True
        ):
            linear.weight, linear.row_bytes = weight.packed.data_ptr(), weight.packed.stride(0)
            linear.layout = native.LAYOUTS.index(weight.layout)
            linear.w_scale = weight.w_scale.data_ptr()
            linear.in_features, linear.out_features = weight.in_features, weight.out_features
            if bias is not None:
                linear.bias, linear.bias_type = bias.data_ptr(), native.TYPES[bias.dtype]
            linear.threads = torch.get_num_threads()
            linear.path = native.PATHS.index(native.path())
        call.type = native.TYPES[dtype]
        call.norm, call.mlp_norm = (norm.data_ptr() for norm in norms)
        call.epsilon, call.mlp_epsilon = epsilons
        if head_norms is not None:
            call.q_norm, call.k_norm = (norm.data_ptr() for norm in head_norms)
            call.qk_epsilon = head_epsilon
        (call.heads, call.kv_heads), call.head_dim = heads, head_dim
        call.scaling = scaling


class StackCall:
    """Layers that follow each other, ready to be called; from several threads too.

    Args:
        layers: at least one; of the same hidden size, dtype and ``head_dim``.
    """

    def __init__(self, layers: list[LayerCall]) -> None:
        self._alive, self._array = layers, _Layer * len(layers)
        self._calls = self._array(*(layer._call for layer in layers))

    def __call__(
        self,
        x: Tensor,
        cosine: Tensor,
        sine: Tensor,
        caches: list[tuple[Tensor, Tensor]],
        position: int,
    ) -> Tensor:
        """The last layer's output ``[1, 1, hidden]`` for the first one's input of that shape.

        Args:
            cosine, sine: of this position, ``[..., head_dim]``, one row.
            caches: keys and values of each layer, ``[1, key heads, capacity, head_dim]``, dense in
                the last two dimensions and of the same strides; written at ``position``.
            position: how many tokens came before, fewer than the capacity.
        """
        calls, y = self._array.from_buffer_copy(self._calls), torch.empty_like(x)
        calls[0].x, calls[-1].y, calls[0].position = x.data_ptr(), y.data_ptr(), position
        calls[0].cosine, calls[0].sine = cosine.data_ptr(), sine.data_ptr()
        for call, (keys, values) in zip(calls, caches, strict=True):
            call.keys, call.values = keys.data_ptr(), values.data_ptr()
            call.kv_stride = keys.stride(1)
        native.run_layers(calls, len(calls))
        return y
