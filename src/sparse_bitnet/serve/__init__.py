"""A model directory at work: one text, a conversation, an HTTP server."""
