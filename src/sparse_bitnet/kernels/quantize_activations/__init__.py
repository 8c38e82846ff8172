"""Activations → integers with one scale a token."""

from sparse_bitnet.kernels.quantize_activations.reference import quantize_activations

__all__ = ["quantize_activations"]
