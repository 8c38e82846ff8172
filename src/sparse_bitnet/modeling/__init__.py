"""One decoder for the Llama family, built from packed weights, and its key-value caches."""

from sparse_bitnet.modeling.build import build_decoder, unsupported
from sparse_bitnet.modeling.cache import KeyValueCache, StaticKeyValueCache
from sparse_bitnet.modeling.decoder import DecoderForCausalLM

__all__ = [
    "DecoderForCausalLM",
    "KeyValueCache",
    "StaticKeyValueCache",
    "build_decoder",
    "unsupported",
]
