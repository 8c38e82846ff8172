"""The method's own definition, unchanged."""

from sparse_bitnet.core.ternary import ternarize

__all__ = ["ternarize"]
