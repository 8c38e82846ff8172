"""Make packed models known to transformers, without importing transformers.

transformers looks a quantizer up in a table of ``transformers.quantizers.auto``. Importing that
module takes seconds, which every command and every ``import sparse_bitnet`` would pay. So an import
hook waits for whoever imports it first and adds the quantizer then.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

AWAITED = "transformers.quantizers.auto"
QUANTIZER = "sparse_bitnet.packed.quantizer"


def register_when_needed() -> None:
    """Register the quantizer now if transformers' table exists, else as soon as it does."""
    if AWAITED in sys.modules:
        import_module(QUANTIZER)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds only the awaited module, the way it would be found anyway, and then retires."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfterwards(spec.loader)
        return spec


class _RegisterAfterwards(Loader):
    """The module's own loader, and the registration once it has run."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        import_module(QUANTIZER)

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)  # get_source and the like, for tracebacks
