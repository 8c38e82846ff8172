"""Sparse-BitNet: language models with ternary weights and N:M sparsity.

    from sparse_bitnet import convert, pack

    convert(model, "6:8")          # any causal language model of transformers, in place
    ...                            # train it as before
    pack(model, "packed")          # AutoModelForCausalLM.from_pretrained("packed") runs it

Importing this package also teaches transformers to load packed directories.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparse_bitnet.packed.registration import register_when_needed
from sparse_bitnet.version import __version__

if TYPE_CHECKING:
    from sparse_bitnet.core import Method, Pattern, SparseBitNetError
    from sparse_bitnet.nn.convert import convert, set_pattern
    from sparse_bitnet.nn.derived import frozen
    from sparse_bitnet.packed.load import load
    from sparse_bitnet.packed.write import pack
    from sparse_bitnet.serve.generate import generate

# Imported when first used: torch and transformers take seconds.
_HOME = {
    "Method": "core",
    "Pattern": "core",
    "SparseBitNetError": "core",
    "convert": "nn",
    "frozen": "nn",
    "generate": "serve.generate",
    "load": "packed.load",
    "pack": "packed.write",
    "set_pattern": "nn",
}

__all__ = [
    "Method",
    "Pattern",
    "SparseBitNetError",
    "__version__",
    "convert",
    "frozen",
    "generate",
    "load",
    "pack",
    "set_pattern",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


register_when_needed()
