"""Sparse-BitNet: language models with ternary weights and N:M sparsity."""
