"""vLLM's linear layers over packed ternary weights: loading, preparing, computing.

A layer of vLLM may be several of ours fused into its rows (q, k and v; gate and up), each with its
own γ, and under tensor parallelism holds a part of their rows (column parallel) or of their columns
(row parallel). Stored bytes are cut the same way, as each row's weights follow each other. Tokens
of a row-parallel layer are cut as well, and all parts of a token need its one scale: that of the
largest magnitude in all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.utils import set_weight_attrs

from sparse_bitnet.core import ConfigError, PackedFormatError, row_scale
from sparse_bitnet.formats import storage
from sparse_bitnet.kernels import quantize_activations
from sparse_bitnet.kernels.registry import TernaryWeight, integer_linear, prepare, ternary_linear
from sparse_bitnet.nn.packed_module import PackedSpec

UNWRITTEN = 255
"""A byte that no storage format writes: what was never loaded does not pass for a weight."""
SHARDS = {"q": 0, "k": 1, "v": 2}
PADDING = 16
"""Columns that carry a token's absmax; copies of rows stay aligned for the Hopper kernels."""


class PackedLinearMethod(LinearMethodBase):
    """Computes one layer from its ternary weight at two bits.

    Args:
        spec: of the packed modules that the layer is made of.
        where: the layer's name, for error messages.
    """

    weight: TernaryWeight

    def __init__(self, spec: PackedSpec, where: str) -> None:
        self.spec, self.where = spec, where
        self.storage = storage(spec.storage)

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Register ``weight`` (uint8 ``[out, bytes]``) and ``weight_scale`` (γ of each shard).

        Raises:
            ConfigError: if the columns cannot be cut for so many GPUs.
        """
        self.columns, self.rows = input_size_per_partition, tuple(output_partition_sizes)
        self.is_cut = input_size_per_partition != input_size
        if self.is_cut:
            self._check_cut(input_size)
        self.dtype = params_dtype
        self.most_tokens = get_current_vllm_config().scheduler_config.max_num_batched_tokens
        stored = (sum(self.rows), self.storage.packed_length(self.columns))
        weight = torch.full(stored, UNWRITTEN, dtype=torch.uint8)
        loader = extra["weight_loader"]
        add_parameter(layer, "weight", weight, input_dim=1, output_dim=0, weight_loader=loader)
        scale = torch.full((len(self.rows),), torch.nan, dtype=torch.float32)
        add_parameter(layer, "weight_scale", scale, weight_loader=self._load_scale)

    def _check_cut(self, input_size: int) -> None:
        parts = input_size // self.columns
        length, pattern = self.storage.packed_length, self.spec.pattern
        fills_bytes = length(self.columns + 1) > length(self.columns)
        if not fills_bytes or self.columns % pattern.m or self.spec.activation_bits != 8:
            raise ConfigError(
                f"{self.where}: rows of {input_size} weights ({self.spec.storage}, "
                f"{self.spec.pattern}, {self.spec.activation_bits} activation bits) cannot be cut "
                f"into {parts} equal parts; use another tensor_parallel_size"
            )

    def _load_scale(
        self, parameter: nn.Parameter, loaded: Tensor, shard: str | int | None = None
    ) -> None:
        """γ of one shard; of all, where a module is fused in the directory."""
        target = parameter.data
        if shard is not None:
            index = SHARDS[shard] if isinstance(shard, str) else shard
            target = target[index : index + 1]
        if target.shape != loaded.shape:
            raise PackedFormatError(
                f"{self.where}.weight_scale: {list(loaded.shape)} values are stored where vLLM "
                f"reads {list(target.shape)}; serve this model with: sparse-bitnet serve"
            )
        target.copy_(loaded)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded and pack it for the device.

        Raises:
            PackedFormatError: if bytes or scales are missing, or are none that packing writes.
        """
        stored, scale = layer.weight.data, layer.weight_scale.data
        ternary = self.storage.unpack(stored, self.columns, f"{self.where}.weight")
        check_scale(scale, self.where)
        gammas = row_scale(scale, self.rows, sum(self.rows))
        as_stored = stored if self.spec.storage == "two-bit" else None
        weight = prepare(ternary, gammas, as_stored)
        layer.weight = nn.Parameter(weight.packed, requires_grad=False)
        layer.weight_scale = nn.Parameter(weight.w_scale, requires_grad=False)
        self.weight = weight
        self._warm(layer.bias)

    def _warm(self, bias: Tensor | None) -> None:
        """Compile kernels now: a CUDA graph cannot, and the first request should not wait."""
        weight = self.weight
        key = (weight.layout, weight.out_features, self.columns, self.dtype, bias is None)
        if weight.device.type != "cuda" or key in _WARM:
            return
        _WARM.add(key)
        for tokens in token_counts(self.most_tokens):
            x = torch.zeros(tokens, self.columns, dtype=self.dtype, device=weight.device)
            self._compute(x, bias, x[:, :1] if self.is_cut else None)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if not self.is_cut:
            return self._compute(x, bias)
        own = x.abs().amax(-1, keepdim=True)
        return self._compute(x, bias, tensor_model_parallel_all_gather(own).amax(-1, keepdim=True))

    def _compute(self, x: Tensor, bias: Tensor | None, absmax: Tensor | None = None) -> Tensor:
        if absmax is not None:
            x_q, x_scale = quantize_part(x, absmax)
        elif self.spec.activation_bits == 8:
            return ternary_linear(x, self.weight, bias)
        else:
            x_q, x_scale = quantize_activations(x, self.spec.activation_bits)
        return integer_linear(x_q, x_scale, self.weight, bias, x.dtype)


_WARM: set[tuple[Any, ...]] = set()


def token_counts(most: int) -> list[int]:
    """Token counts up to ``most`` that meet every tile of a kernel; few tokens have narrow ones."""
    return sorted({1, *range(8, min(256, most), 8), *range(256, most, 64), most})


def quantize_part(x: Tensor, absmax: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a part of each token by the absmax of the whole.

    Args:
        x: ``[..., part]``, float.
        absmax: ``[..., 1]``, of all parts of the token.

    Returns:
        int8 ``[..., part]`` and float32 ``[..., 1]``, equal to what ``quantize_activations`` gives
        for whole tokens.
    """
    # It rides along as further columns, so that the same kernel rounds the same way.
    widened = torch.cat([x, absmax.expand(*absmax.shape[:-1], PADDING)], dim=-1)
    x_q, x_scale = quantize_activations(widened)
    return x_q[..., : x.shape[-1]], x_scale


def add_parameter(layer: nn.Module, name: str, tensor: Tensor, **attributes: Any) -> None:
    """Register a parameter with the attributes by which vLLM loads it."""
    parameter = nn.Parameter(tensor, requires_grad=False)
    set_weight_attrs(parameter, attributes)
    layer.register_parameter(name, parameter)


def check_scale(scale: Tensor, where: str) -> None:
    """Refuse scales that packing never writes; NaN is what was never loaded.

    Raises:
        PackedFormatError: unless all are positive numbers.
    """
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise PackedFormatError(
            f"{where}.weight_scale: a scale is missing or not a positive number; get the "
            "directory again, or pack the model again"
        )
