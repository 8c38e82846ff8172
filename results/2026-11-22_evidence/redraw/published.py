"""The published figures that ours are held against: data alone, each with its source.

"Sparse-BitNet: 1.58-bit LLMs are Naturally Friendly to Semi-Structured Sparsity", arXiv 2603.05168
(March 2026): Qwen2.5 shapes of 0.5B, 1.5B and 3B, RefinedWeb, about 50B tokens.
"""

from __future__ import annotations

SOURCE = "arXiv 2603.05168"

# Validation perplexity over that of the same model without a mask, 0.5B.
NORMALISED_PPL = {
    "bf16": {"7:8": 1.02, "6:8": 1.05, "5:8": 1.07, "4:8": 1.19, "3:8": 1.31, "2:8": 1.45},
    "bitnet": {"7:8": 1.01, "6:8": 1.01, "5:8": 1.03, "4:8": 1.06, "3:8": 1.15, "2:8": 1.27},
}

# The paper's line for "collapse", and the first pattern beyond it.
COLLAPSE_AT = 1.10
FIRST_BEYOND = {"bf16": "4:8", "bitnet": "3:8"}

# Perplexity at 6:8 minus that of the model's own dense model, by size.
DELTA_PPL_6_8 = {
    "bf16": {"0.5B": 1.20, "1.5B": 0.60, "3B": 0.45},
    "bitnet": {"0.5B": 0.32, "1.5B": 0.24, "3B": 0.17},
}

# Mean downstream accuracy at 6:8 minus that of the dense model, in points.
DELTA_ACCURACY_6_8 = {
    "bf16": {"0.5B": -3.02, "1.5B": -7.71, "3B": -3.20},
    "bitnet": {"0.5B": -1.15, "1.5B": -3.79, "3B": -0.80},
}

ZEROS_BEFORE_MASK = 0.42

# Ablations at 6:8, 0.5B, validation perplexity. None: said to be worse, no figure given.
ABLATIONS_PPL: dict[str, float | None] = {
    "published": 26.31,
    "mask-from-quantized": 32.23,
    "masked-gradient": None,
    "mask-then-quant": None,
}

# Dense for a first part of training, then 6:8; the three published switch points, in order.
DENSE_TO_SPARSE_PPL = {"switched": (27.48, 27.39, 26.71), "sparse from scratch": 26.31}
