"""Decoder layer: attention and gated MLP over fused linears."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from sparse_bitnet.kernels.decode_attention import decode_attention
from sparse_bitnet.kernels.matmul.cpu import float_linear
from sparse_bitnet.kernels.platform import runs_triton
from sparse_bitnet.kernels.quantize_activations import add_norm_quantize, quantize_fused
from sparse_bitnet.nn.packed_linear import PackedLinear

Rotary = tuple[Tensor, Tensor]
"""Cosine and sine of each position, ``[batch or 1, tokens, head_dim]``."""
FULL, SLIDING = "full_attention", "sliding_attention"
"""transformers' names of the kinds of attention."""


class RMSNorm(nn.Module):
    """y = weight · x / √(mean(x²) + ε) over the last dimension, computed in float32."""

    def __init__(self, weight: nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = weight, epsilon

    def forward(self, x: Tensor) -> Tensor:
        values = x.float()
        values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.weight * values.to(x.dtype)


class Head(nn.Linear):
    """The output head in floating point: ``[..., hidden]`` → ``[..., vocabulary]``.

    ``nn.Linear`` with the compiled library's product for few tokens on a CPU, which reads the
    weight as fast as memory gives it.
    """

    def __init__(self, head: nn.Linear) -> None:
        super().__init__(head.in_features, head.out_features, head.bias is not None, device="meta")
        self.weight, self.bias = head.weight, head.bias

    def forward(self, x: Tensor) -> Tensor:
        return float_linear(x, self.weight, self.bias)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate heads ``[batch, heads, tokens, head_dim]`` by their positions."""
    cosine, sine = (part.unsqueeze(1) for part in rotary)
    first, second = x.chunk(2, dim=-1)
    return (x * cosine) + (torch.cat((-second, first), dim=-1) * sine)


class Attention(nn.Module):
    """Attention from q/k/v ``[batch, tokens, q + k + v]`` to ``[batch, tokens, hidden]``.

    Attributes ``layer_idx``, ``is_causal``, ``num_key_value_groups`` and ``sliding_window`` are
    what transformers' attention functions read.
    """

    qkv_proj: Any  # a PackedLinear or an nn.Linear, as all products here
    o_proj: Any

    def __init__(
        self,
        config: PreTrainedConfig,
        index: int,
        qkv_proj: Any,
        o_proj: Any,
        head_norms: tuple[RMSNorm, RMSNorm] | None,
        head_dim: int,
        sliding_window: int | None,
    ) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, index, True
        self.qkv_proj, self.o_proj = qkv_proj, o_proj
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if head_norms is not None:
            self.q_norm, self.k_norm = head_norms
        self.head_dim, self.scaling, self.sliding_window = head_dim, head_dim**-0.5, sliding_window
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.num_key_value_groups = self.heads // self.kv_heads

    def forward(
        self, qkv: Tensor, rotary: Rotary, mask: Any, past: Any = None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The result, and attention weights where the attention function gives them.

        Args:
            qkv: of ``qkv_proj``.
            rotary: of the tokens.
            mask: of transformers' mask functions.
            past: this layer's cache, with transformers' ``update``.
            options: for the attention function.
        """
        batch, tokens, _ = qkv.shape
        heads = qkv.view(batch, tokens, -1, self.head_dim)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        q, k = rotate(q, rotary), rotate(k, rotary)
        if past is not None:
            k, v = past.update(k, v)
        attend, weights = self._function(q, k, v, mask, options), None
        if attend is None:
            y = decode_attention(q, k, v, mask, self.scaling).transpose(1, 2)
        else:
            y, weights = attend(
                self,
                q,
                k,
                v,
                mask,
                dropout=0.0,
                scaling=self.scaling,
                sliding_window=self.sliding_window,
                **options,
            )
        return self.o_proj(y.reshape(batch, tokens, -1)), weights

    def _function(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any]
    ) -> Callable[..., tuple[Tensor, Tensor | None]] | None:
        """transformers' attention function; None for our kernel for one new token a sequence.

        PyTorch's kernels either repeat the cache for every query head there, or run on as many
        multiprocessors as there are key heads.
        """
        name = self.config._attn_implementation
        if (
            name == "sdpa"
            and q.shape[2] == 1
            and q.dtype == k.dtype == v.dtype  # autocast lets them differ
            and (mask is None or mask.dtype == torch.bool)
            and options.get("cache") is None  # continuous batching's, which sdpa itself updates
            and runs_triton(q)
        ):
            return None
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            name, eager_attention_forward
        )
        return attend


class MLP(nn.Module):
    """down(activation(gate(x)) · up(x)): ``[..., hidden]`` → ``[..., hidden]``."""

    gate_up_proj: Any
    down_proj: Any

    def __init__(self, gate_up_proj: Any, down_proj: Any, activation: str) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj
        self.activation = ACT2FN[activation]
        self.is_silu = activation == "silu"
        self.is_fused = (
            self.is_silu
            and isinstance(down_proj, PackedLinear)
            and down_proj.spec.activation_bits == 8
        )

    def forward(self, x: Tensor) -> Tensor:
        return self._down(self.gate_up_proj(x))

    def from_integers(self, x_q: Tensor, x_scale: Tensor, residual: Tensor) -> Tensor:
        """residual + MLP(x) of quantized activations: on a GPU, SwiGLU and quantization are one."""
        gate_up = self.gate_up_proj.from_integers(x_q, x_scale, residual.dtype)
        if not self.is_fused:
            return residual + self._down(gate_up)
        y_q, y_scale = quantize_fused(gate_up, swiglu=True)
        y: Tensor = self.down_proj.from_integers(y_q, y_scale, residual.dtype, residual)
        return y

    def _down(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        y: Tensor = self.down_proj(self.activation(gate) * up)
        return y


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to its input: ``[batch, tokens, hidden]``."""

    def __init__(
        self,
        attention: Attention,
        mlp: MLP,
        input_layernorm: RMSNorm,
        post_attention_layernorm: RMSNorm,
    ) -> None:
        super().__init__()
        self.self_attn, self.mlp = attention, mlp
        self.input_layernorm = input_layernorm
        self.post_attention_layernorm = post_attention_layernorm
        linears = (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
        self.is_packed = all(
            isinstance(linear, PackedLinear) and linear.spec.activation_bits == 8
            for linear in linears
        )

    def linears(self) -> list[PackedLinear]:
        """q/k/v, o, gate/up and down, where all are packed with 8-bit activations; else none."""
        attention, mlp = self.self_attn, self.mlp
        all_four: Any = [attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj]
        return all_four if self.is_packed else []

    def forward(
        self, x: Tensor, rotary: Rotary, mask: Any, past: Any = None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The layer's output and attention weights; arguments as of :class:`Attention`."""
        attention, norm, mlp_norm = (
            self.self_attn,
            self.input_layernorm,
            self.post_attention_layernorm,
        )
        if self._norms_quantize(x):
            x_q, x_scale = quantize_fused(x, norm.weight, norm.epsilon)
            qkv = attention.qkv_proj.from_integers(x_q, x_scale, x.dtype)
            mixed, weights = attention(qkv, rotary, mask, past, **options)
            x, x_q, x_scale = add_norm_quantize(x, mixed, mlp_norm.weight, mlp_norm.epsilon)
            return self.mlp.from_integers(x_q, x_scale, x), weights
        mixed, weights = attention(attention.qkv_proj(norm(x)), rotary, mask, past, **options)
        x = x + mixed
        return x + self.mlp(mlp_norm(x)), weights

    def _norms_quantize(self, x: Tensor) -> bool:
        """True if norm and quantization are one kernel: on a GPU."""
        return (
            self.is_packed
            and self.input_layernorm.weight.dtype == x.dtype
            and self.post_attention_layernorm.weight.dtype == x.dtype
            and not torch.is_autocast_enabled(x.device.type)
            and runs_triton(x)
        )
