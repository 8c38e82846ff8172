"""Master weight → masked ternary weight and scales."""

from sparse_bitnet.kernels.ternarize.reference import ternarize

__all__ = ["ternarize"]
