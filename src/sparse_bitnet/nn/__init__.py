"""The method as PyTorch modules, and the swap that puts them into a model."""
