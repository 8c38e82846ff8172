"""The method in plain PyTorch: the reference implementation."""

from sparse_bitnet.core.activation import quantize_activations, quantize_int4, quantize_int8
from sparse_bitnet.core.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    DataError,
    MissingExtraError,
    OutputError,
    PackedFormatError,
    PatternError,
    SparseBitNetError,
    TrainingError,
    WeightError,
    shown,
)
from sparse_bitnet.core.mask import nm_mask, worst_group
from sparse_bitnet.core.method import Method
from sparse_bitnet.core.pattern import DENSE, Pattern
from sparse_bitnet.core.polarization import Polarization, polarization, pruning_thresholds
from sparse_bitnet.core.ternary import (
    absmean,
    check_finite,
    check_row,
    check_shard_sizes,
    method_mask,
    round_ternary,
    row_scale,
    scale_of,
    scale_sums,
    ternarize,
    ternarize_with,
    zero_matrices,
)

__all__ = [
    "DENSE",
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Method",
    "MissingExtraError",
    "OutputError",
    "PackedFormatError",
    "Pattern",
    "PatternError",
    "Polarization",
    "SparseBitNetError",
    "TrainingError",
    "WeightError",
    "absmean",
    "check_finite",
    "check_row",
    "check_shard_sizes",
    "method_mask",
    "nm_mask",
    "polarization",
    "pruning_thresholds",
    "quantize_activations",
    "quantize_int4",
    "quantize_int8",
    "round_ternary",
    "row_scale",
    "scale_of",
    "scale_sums",
    "shown",
    "ternarize",
    "ternarize_with",
    "worst_group",
    "zero_matrices",
]
