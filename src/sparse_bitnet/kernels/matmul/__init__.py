"""int8 activations × ternary weights, scaled once."""

from sparse_bitnet.kernels.matmul.reference import integer_matmul, ternary_matmul

__all__ = ["integer_matmul", "ternary_matmul"]
