"""Experiments over many runs, and what they show."""
