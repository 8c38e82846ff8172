"""The address that packed directories name.

Their ``hf_plugin.py`` was written when they were packed and imports from here, so this module stays
where it is. The code is in packed/quantizer.py.
"""

from sparse_bitnet.deploy.packed.quantizer import PackedModelConfig

__all__ = ["PackedModelConfig"]
