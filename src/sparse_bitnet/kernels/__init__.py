"""The three operations of a layer: ternarize the weight, quantize the activations, multiply.

One folder an operation, one file a backend; ``reference.py`` is the judge of the others.
"""

from sparse_bitnet.kernels.matmul import ternary_matmul
from sparse_bitnet.kernels.quantize_activations import quantize_activations
from sparse_bitnet.kernels.ternarize import ternarize

__all__ = ["quantize_activations", "ternarize", "ternary_matmul"]
