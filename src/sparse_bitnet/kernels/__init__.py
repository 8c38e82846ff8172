"""The operations of a layer: ternarize the weight, quantize the activations, multiply; backward.

One folder an operation, one file a backend; ``reference.py`` is the reference implementation.
"""

from sparse_bitnet.kernels.matmul import integer_matmul, ternary_matmul
from sparse_bitnet.kernels.quantize_activations import quantize_activations
from sparse_bitnet.kernels.ternarize import ternarize

__all__ = ["integer_matmul", "quantize_activations", "ternarize", "ternary_matmul"]
