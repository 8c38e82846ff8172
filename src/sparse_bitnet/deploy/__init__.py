"""Packed models: written, loaded, run."""
