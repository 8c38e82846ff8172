"""Inference from a model directory: generate, chat, an HTTP server."""
