"""Weights at rest: one file a format, each a pure pack and unpack pair, lossless."""
