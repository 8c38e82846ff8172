"""The method's own definition, unchanged."""

from sparse_bitnet.core.activation import quantize_activations

__all__ = ["quantize_activations"]
