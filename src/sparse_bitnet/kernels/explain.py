"""The verb ``kernels``: which backend serves packed weights on a device, and why."""

from __future__ import annotations

import torch

from sparse_bitnet.kernels.matmul import hopper
from sparse_bitnet.kernels.platform import usable_device
from sparse_bitnet.kernels.registry import backend_of

LAYERS = {"gate_up": (37888, 3584), "down": (3584, 18944), "qkv": (4608, 3584), "o": (3584, 3584)}
TOKENS = (1, 16, 64, 256, 4096)


def explain(device: str | None = None) -> str:
    """Which backend multiplies by packed weights on a device, and why.

    On Hopper, too, how it would compute the layers of a 7B Qwen2.5.

    Args:
        device: the first CUDA device if left out, or CPU where there is none.

    Raises:
        ConfigError: if the device cannot be used.
    """
    where = usable_device(device)
    backend = backend_of(where)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else str(where)
    lines = [f"{name}: packed weights are multiplied by {backend.name} ({backend.reason(where)})"]
    if backend.name == "hopper":
        index = torch.cuda.current_device() if where.index is None else where.index
        lines += _plans(index)
    return "\n".join(lines)


def _plans(device_index: int) -> list[str]:
    lines = ["layer     tokens  kernel and tile, rows × tokens (slices of K)"]
    for layer, shape in LAYERS.items():
        for tokens in TOKENS:
            plan = hopper.plan(tokens, *shape, device_index)
            tile = f"{plan.tile.kind} {plan.tile.rows} × {plan.tile.tokens}"
            cut = f" ({plan.splits})" if plan.splits > 1 else ""
            lines.append(f"{layer:8}  {tokens:6}  {tile}{cut}")
    return lines
