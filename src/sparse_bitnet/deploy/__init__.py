"""Holds hf_quantizer.py alone, for directories packed by version 0.1."""
