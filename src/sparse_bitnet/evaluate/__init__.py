"""Measuring a model: perplexity and downstream tasks."""
