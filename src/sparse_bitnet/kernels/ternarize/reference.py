"""The method's own definition, unchanged."""

from sparse_bitnet.core.ternary import ternarize, ternarize_with

__all__ = ["ternarize", "ternarize_with"]
