"""vLLM's quantization config of a packed directory: which layer is computed by what."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import WeightsMapper

from sparse_bitnet.core import ConfigError
from sparse_bitnet.kernels.platform import OLDEST_CAPABILITY
from sparse_bitnet.nn.int8_head import swap_int8
from sparse_bitnet.nn.pack import swap_packed
from sparse_bitnet.nn.packed_experts import PackedExperts
from sparse_bitnet.nn.packed_module import PackedSpec
from sparse_bitnet.packed.config import HINT, QUANT_METHOD, SparseBitNetConfig
from sparse_bitnet.packed.load import read_config
from sparse_bitnet.packed.verify import verify_files, weight_files
from sparse_bitnet.serve.vllm.linear import PackedLinearMethod
from sparse_bitnet.serve.vllm.table import Int8TableMethod
from sparse_bitnet.train.dense import LOCAL


@register_quantization_config(QUANT_METHOD)
class PackedConfig(QuantizationConfig):
    """The ``quantization_config`` of a packed directory, as vLLM reads it.

    Args:
        described: of the directory's ``config.json``.
    """

    def __init__(self, described: SparseBitNetConfig) -> None:
        super().__init__()
        self.specs = described.specs()
        self.int8 = described.int8  # the head, or a tied embedding and the head

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PackedConfig:
        """
        Raises:
            PackedFormatError: if a field is missing, unknown or out of range.
        """
        return cls(SparseBitNetConfig(**config))

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        major, minor = OLDEST_CAPABILITY
        return 10 * major + minor

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @staticmethod
    def get_cache_scale_mapper() -> WeightsMapper:
        """Drops the tensor whose name tells readers without this package what to install."""
        return WeightsMapper(orig_to_new_prefix={HINT: None})

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.specs = hf_to_vllm_mapper.apply_dict(self.specs)

    def maybe_update_config(
        self, model_name: str, hf_config: object = None, revision: str | None = None
    ) -> None:
        """Verify a local directory before vLLM loads it, which leaves missing tensors random.

        Raises:
            PackedFormatError, ConfigError: as :func:`check_directory`.
        """
        if Path(model_name).is_dir():
            check_directory(Path(model_name))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """
        Raises:
            ConfigError: for a layer of which a part is packed and another is not.
        """
        if isinstance(layer, VocabParallelEmbedding):
            # Not by name: Llama's embedding is given none.
            is_int8 = len(self.int8) > (0 if isinstance(layer, ParallelLMHead) else 1)
            return Int8TableMethod(prefix) if is_int8 else None
        if not isinstance(layer, LinearBase):
            return None
        spec = self._spec(prefix)
        return UnquantizedLinearMethod() if spec is None else PackedLinearMethod(spec, prefix)

    def _spec(self, prefix: str) -> PackedSpec | None:
        """The spec of a layer that vLLM may have fused of several; None if it is not packed."""
        parent, _, name = prefix.rpartition(".")
        names = [prefix]
        if prefix not in self.specs:
            names = [f"{parent}.{part}" for part in self.packed_modules_mapping.get(name, [name])]
        kinds = {
            None if spec is None else (spec.storage, spec.activation_bits)
            for spec in map(self.specs.get, names)
        }
        if len(kinds) > 1:
            raise ConfigError(
                f"{prefix}: vLLM computes {', '.join(names)} as one layer, and of these some are "
                "not packed or have other activation bits; serve this model with: sparse-bitnet "
                "serve"
            )
        return self.specs.get(names[0])


@cache
def check_directory(directory: Path) -> None:
    """Check that a packed directory is complete, unchanged, and can be served by vLLM.

    Raises:
        PackedFormatError: naming the file and what is wrong with it.
        ConfigError: if the model has packed experts.
    """
    _, described = read_config(directory)
    config = AutoConfig.from_pretrained(directory, **LOCAL)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    swap_packed(model, described.specs())
    swap_int8(model, described.int8)
    for name, module in model.named_modules():
        if isinstance(module, PackedExperts):
            raise ConfigError(
                f"{directory}: {name} holds packed experts, which the vLLM plugin does not serve; "
                "use: sparse-bitnet serve"
            )
    verify_files(weight_files(directory), model)
