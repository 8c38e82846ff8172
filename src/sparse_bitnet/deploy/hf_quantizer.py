"""Import path that the ``hf_plugin.py`` in directories packed by version 0.1 names."""

from sparse_bitnet.packed.quantizer import PackedModelConfig

__all__ = ["PackedModelConfig"]
