"""Prefill and decode speed of whole models, for the verb and for benchmarks/."""
