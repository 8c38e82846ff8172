"""Kernel selection for training: dense or sparse forward products of each layer."""

from __future__ import annotations

from torch import nn

from sparse_bitnet.kernels import training
from sparse_bitnet.nn.convert import converted_modules
from sparse_bitnet.nn.sparse_bit_linear import SparseBitLinear


def choose_products(model: nn.Module, tokens: int) -> dict[str, str]:
    """The fastest product of each layer for its present pattern; nothing is changed.

    Measured once a shape on the layers' own device and remembered
    (:func:`sparse_bitnet.kernels.training.choose`).

    Args:
        tokens: of one forward pass.

    Returns:
        "dense" or "sparse" by module name.
    """
    return {
        name: training.choose(
            module.out_features,
            module.in_features,
            module.pattern,
            tokens,
            module.weight.device,
        ).backend
        for name, module in converted_modules(model)
        if isinstance(module, SparseBitLinear)
    }


def use_products(model: nn.Module, products: dict[str, str]) -> None:
    """Let layers use the products named; those not named keep theirs.

    Where weights are sharded, every rank must call with the same products.
    """
    for name, module in converted_modules(model):
        if name in products and isinstance(module, SparseBitLinear):
            module.use(products[name])
