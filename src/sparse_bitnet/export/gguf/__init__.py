"""Export to GGUF for llama.cpp: tensors, hyper-parameters, tokenizer."""
