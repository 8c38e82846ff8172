"""Ternary model → one GGUF file for llama.cpp: tensors, hyper-parameters, tokenizer."""
