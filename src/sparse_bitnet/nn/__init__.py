"""The method as PyTorch modules, and ``convert``, which swaps them into a model."""

from sparse_bitnet.nn.blend import set_quantization
from sparse_bitnet.nn.convert import (
    Conversion,
    MasterWeight,
    convert,
    converted_modules,
    master_weights,
    set_pattern,
)
from sparse_bitnet.nn.derived import DerivedModule, frozen
from sparse_bitnet.nn.experts import SparseBitExperts, SparseExperts
from sparse_bitnet.nn.shards import shard
from sparse_bitnet.nn.sparse_bit_linear import SparseBitLinear
from sparse_bitnet.nn.sparse_linear import SparseLinear
from sparse_bitnet.nn.sub_norm import add_sub_norms

__all__ = [
    "Conversion",
    "DerivedModule",
    "MasterWeight",
    "SparseBitExperts",
    "SparseBitLinear",
    "SparseExperts",
    "SparseLinear",
    "add_sub_norms",
    "convert",
    "converted_modules",
    "frozen",
    "master_weights",
    "set_pattern",
    "set_quantization",
    "shard",
]
