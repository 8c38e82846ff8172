"""Master weight → masked ternary weight and scales."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_bitnet.core.mask import nm_mask
from sparse_bitnet.core.method import Method
from sparse_bitnet.core.pattern import Pattern
from sparse_bitnet.core.ternary import check_shard_sizes, method_mask
from sparse_bitnet.kernels.library import register
from sparse_bitnet.kernels.platform import runs_triton
from sparse_bitnet.kernels.ternarize import cpu, reference

__all__ = ["kept_weights", "ternarize", "ternarize_traced", "ternarize_with"]

PUBLISHED = Method()


def ternarize(
    weight: Tensor,
    pattern: Pattern,
    method: Method | None = None,
    shard_sizes: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Masked ternary weight and γ; arguments, results and errors of ``core.ternarize``.

    Two passes of a Triton kernel on CUDA or of the compiled library on a CPU for the published
    method; the reference for its ablations and elsewhere. All give the same values.
    """
    method = method or PUBLISHED
    if _published(method) and weight.ndim >= 2 and cpu.serves(weight):
        return cpu.ternarize(weight, pattern, shard_sizes)
    if not (_published(method) and runs_triton(weight) and weight.ndim >= 2):
        return reference.ternarize(weight, pattern, method, shard_sizes)
    from sparse_bitnet.kernels.ternarize import triton

    pattern.check_divides(weight.shape[-1])
    check_shard_sizes(shard_sizes, weight.shape[-2])
    with torch.cuda.device_of(weight):
        return triton.ternarize(weight.detach(), pattern, shard_sizes)


def ternarize_with(weight: Tensor, scale: Tensor, pattern: Pattern, method: Method) -> Tensor:
    """The ternary weight alone, from γ of every row: ``core.ternarize_with``, by a kernel."""
    if not (_published(method) and weight.numel()):
        return reference.ternarize_with(weight, scale, pattern, method)
    if cpu.serves(weight):
        return cpu.ternarize_with(weight, scale, pattern)
    if not runs_triton(weight):
        return reference.ternarize_with(weight, scale, pattern, method)
    from sparse_bitnet.kernels.ternarize import triton

    pattern.check_divides(weight.shape[-1])
    with torch.cuda.device_of(weight):
        return triton.ternarize_with(weight.detach().contiguous(), scale, pattern)


def ternarize_traced(
    weight: Tensor, pattern: Tensor, method: Method, shard_sizes: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    """The same for a forward that may be compiled: one operator, whatever the pattern.

    Args:
        pattern: N and M, int64 ``[2]`` on the CPU. Compiled code would be made anew for other
            numbers, but not for other values of a tensor.
    """
    ternary, scale = torch.ops.sparse_bitnet.ternarize(
        weight.detach(), pattern, list(shard_sizes), method.order, method.mask_source
    )
    return ternary, scale


def kept_weights(
    weight: Tensor, pattern: Tensor, method: Method, shard_sizes: tuple[int, ...] = ()
) -> Tensor:
    """The mask in force, boolean of the weight's shape, all True if dense; traced likewise."""
    mask: Tensor = torch.ops.sparse_bitnet.kept_weights(
        weight.detach(), pattern, list(shard_sizes), method.mask_source
    )
    return mask


def _published(method: Method) -> bool:
    return method.order == PUBLISHED.order and method.mask_source == PUBLISHED.mask_source


def _ternarize(
    weight: Tensor, pattern: Tensor, shard_sizes: list[int], order: str, mask_source: str
) -> tuple[Tensor, Tensor]:
    method = Method(order=order, mask_source=mask_source)  # type: ignore[arg-type]
    return ternarize(weight, Pattern(*pattern.tolist()), method, tuple(shard_sizes))


def _fake_ternarize(
    weight: Tensor, pattern: Tensor, shard_sizes: list[int], order: str, mask_source: str
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(weight.shape, dtype=torch.int8, device=weight.device),
        weight.new_empty((*weight.shape[:-2], max(1, len(shard_sizes))), dtype=torch.float32),
    )


def _kept(weight: Tensor, pattern: Tensor, shard_sizes: list[int], mask_source: str) -> Tensor:
    method = Method(mask_source=mask_source)  # type: ignore[arg-type]
    now = Pattern(*pattern.tolist())
    mask = method_mask(weight, now, method, tuple(shard_sizes))
    return nm_mask(weight, now) if mask is None else mask


def _fake_kept(weight: Tensor, pattern: Tensor, shard_sizes: list[int], mask_source: str) -> Tensor:
    return torch.empty(weight.shape, dtype=torch.bool, device=weight.device)


for device in ("CPU", "CUDA"):
    register(
        "ternarize(Tensor weight, Tensor pattern, int[] shard_sizes, str order, str mask_source) "
        "-> (Tensor, Tensor)",
        _ternarize,
        _fake_ternarize,
        device,
    )
    register(
        "kept_weights(Tensor weight, Tensor pattern, int[] shard_sizes, str mask_source) -> Tensor",
        _kept,
        _fake_kept,
        device,
    )
