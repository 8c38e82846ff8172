"""Where the package's operators are registered with PyTorch.

Each operation defines its schema, its CUDA kernel and its fake (shape) function, which makes it
work inside ``torch.compile``, CUDA graphs and on meta tensors. Registered through
``torch.library.Library``, whose calls cost a few microseconds of host time; ``custom_op`` costs
several times that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

NAMESPACE = "sparse_bitnet"
_library = torch.library.Library(NAMESPACE, "DEF")


def register(schema: str, cuda: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define one operator that neither mutates nor aliases its arguments.

    ``cuda`` runs with the device of its first argument current, as kernel launches need.
    """

    @wraps(cuda)
    def on_device(*arguments: Any) -> Any:
        with torch.cuda.device_of(arguments[0]):
            return cuda(*arguments)

    name = schema.split("(", maxsplit=1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, on_device, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
