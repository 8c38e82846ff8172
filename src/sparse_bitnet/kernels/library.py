"""Where the package's operators are registered with PyTorch.

Each operation defines its schema, its kernel for one kind of device, and its fake (shape) function,
which makes it work inside ``torch.compile``, CUDA graphs and on meta tensors. Registered through
``torch.library.Library``, whose calls cost a few microseconds of host time; ``custom_op`` costs
several times that.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, Literal

import torch

NAMESPACE = "sparse_bitnet"
_library = torch.library.Library(NAMESPACE, "DEF")


def register(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    device: Literal["CUDA", "CPU"] = "CUDA",
) -> None:
    """Define one operator that neither mutates nor aliases its arguments.

    A second call gives another device its kernel. A CUDA kernel runs with the device of its first
    argument current, as launches need.

    Raises:
        TypeError: if the kernel or the fake does not take the schema's arguments, which on a
            machine without a GPU no call would find out.
    """
    arguments = torch._C.parse_schema(f"{NAMESPACE}::{schema}").arguments
    for function in (kernel, fake):
        inspect.signature(function).bind(*arguments)

    @wraps(kernel)
    def on_device(*arguments: Any) -> Any:
        if arguments[0].device.index == torch.cuda.current_device():  # the usual case, and cheaper
            return kernel(*arguments)
        with torch.cuda.device_of(arguments[0]):
            return kernel(*arguments)

    name = schema.split("(", maxsplit=1)[0]
    if not hasattr(getattr(torch.ops, NAMESPACE), name):
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    _library.impl(name, on_device if device == "CUDA" else kernel, device)
