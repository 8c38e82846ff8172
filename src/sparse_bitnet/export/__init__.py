"""Models to and from the formats of others: GGUF for llama.cpp, transformers' ``bitnet``."""
