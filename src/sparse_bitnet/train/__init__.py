"""Training: configuration, loop, checkpoints, monitor."""
