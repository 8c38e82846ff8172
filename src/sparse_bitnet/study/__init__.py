"""Experiments over many runs: sweep, rows, report, polarization."""
