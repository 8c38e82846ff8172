"""Memory, speed and cost of a model, from its configuration and a device's peak rates."""
