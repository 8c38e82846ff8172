"""vLLM's embedding and output head over a table of int8 rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from sparse_bitnet.kernels.int8_linear import int8_linear
from sparse_bitnet.serve.vllm.linear import add_parameter, check_scale


class Int8TableMethod(QuantizeMethodBase):
    """Looks rows up, and multiplies with them, of int8 with a scale each.

    Args:
        where: the layer's name, for error messages.
    """

    def __init__(self, where: str) -> None:
        self.where = where

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
        """Register ``weight``, int8 ``[rows, width]``, and ``weight_scale``, float32 ``[rows]``."""
        self.dtype = params_dtype
        rows = sum(output_partition_sizes)
        weight = torch.zeros(rows, input_size_per_partition, dtype=torch.int8)
        scale = torch.full((rows,), torch.nan, dtype=torch.float32)
        add_parameter(layer, "weight", weight, output_dim=0, **extra)
        add_parameter(layer, "weight_scale", scale, output_dim=0, **extra)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        layer.weight, layer.weight_scale = embed_tokens.weight, embed_tokens.weight_scale
        return layer

    def process_weights_after_loading(self, layer: Any) -> None:
        """
        Raises:
            PackedFormatError: if scales are missing or are none that packing writes.
        """
        check_scale(layer.weight_scale[: layer.num_org_embeddings_per_partition], self.where)

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        return (layer.weight[ids] * layer.weight_scale[ids].unsqueeze(-1)).to(self.dtype)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return int8_linear(x, layer.weight, layer.weight_scale, bias)
