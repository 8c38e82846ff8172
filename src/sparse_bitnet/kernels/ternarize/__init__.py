"""Master weight → masked ternary weight and scales."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from sparse_bitnet import core
from sparse_bitnet.core.mask import nm_mask
from sparse_bitnet.core.method import Method
from sparse_bitnet.core.pattern import Pattern
from sparse_bitnet.core.ternary import check_shard_sizes, method_mask, row_scale
from sparse_bitnet.formats import two_bit
from sparse_bitnet.kernels.library import register
from sparse_bitnet.kernels.platform import runs_triton
from sparse_bitnet.kernels.ternarize import cpu, reference

__all__ = ["kept_weights", "scale_sums", "ternarize", "ternarize_traced", "two_bits"]

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
    backend = _backend(weight, pattern, method)
    if backend == "triton":
        packed, scale = _triton(weight, pattern, shard_sizes)
        return two_bit.unpack_rows(packed, weight.shape[-1]), scale
    if backend == "cpu":
        return cpu.ternarize(weight, pattern, shard_sizes)
    return reference.ternarize(weight, pattern, method, shard_sizes)


def two_bits(
    weight: Tensor,
    pattern: Pattern,
    method: Method,
    shard_sizes: tuple[int, ...] = (),
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same in two bits: uint8 ``[..., out, ceil(in / 4)]`` of ``formats.two_bit``, and γ.

    Args:
        scale: γ ``[..., shards]``, where it comes from rows of other ranks as well. ``shard_sizes``
            are then of the rows here.
    """
    backend = _backend(weight, pattern, method)
    if backend == "triton":
        return _triton(weight, pattern, shard_sizes, scale)
    if scale is None:
        ternary, scale = ternarize(weight, pattern, method, shard_sizes)
    else:
        rows = row_scale(scale, shard_sizes, weight.shape[-2])
        if backend == "cpu":
            ternary = cpu.ternarize_with(weight, rows, pattern)
        else:
            ternary = reference.ternarize_with(weight, rows, pattern, method)
    return two_bit.pack_rows(ternary), scale


def scale_sums(
    weight: Tensor, pattern: Pattern, method: Method, shard_sizes: tuple[int, ...]
) -> Tensor:
    """``core.scale_sums``, each as a few numbers to add up: float64 ``[2, ..., shards, numbers]``.

    Args:
        weight: a rank's rows, of which ``shard_sizes`` belong to each logical matrix.
    """
    if _backend(weight, pattern, method) == "triton":
        from sparse_bitnet.kernels.ternarize import triton

        with torch.cuda.device_of(weight):
            return triton.scale_sums(weight.contiguous(), shard_sizes)
    mask = method_mask(weight, pattern, method) if method.order == "mask-then-quant" else None
    return core.scale_sums(weight, shard_sizes, mask).unsqueeze(-1)


def _backend(weight: Tensor, pattern: Pattern, method: Method) -> str:
    """``triton``, ``cpu`` (the compiled library), or ``reference``."""
    published = (method.order, method.mask_source) == (PUBLISHED.order, PUBLISHED.mask_source)
    # float64 magnitudes may differ where float32's tie
    if not published or weight.ndim < 2 or not weight.numel() or weight.dtype.itemsize > 4:
        return "reference"
    if runs_triton(weight):
        from sparse_bitnet.kernels.ternarize import triton

        return "triton" if triton.serves(pattern, weight.shape[-1]) else "reference"
    return "cpu" if cpu.serves(weight) else "reference"


def _triton(
    weight: Tensor, pattern: Pattern, shard_sizes: tuple[int, ...], scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    from sparse_bitnet.kernels.ternarize import triton

    pattern.check_divides(weight.shape[-1])
    if scale is None:  # a rank may hold no rows of a matrix
        check_shard_sizes(shard_sizes, weight.shape[-2])
    with torch.cuda.device_of(weight):
        return triton.ternarize(weight.detach().contiguous(), pattern, shard_sizes, scale)


def ternarize_traced(
    weight: Tensor, pattern: Tensor, method: Method, shard_sizes: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    """The same for a forward that may be compiled: one operator, whatever the pattern.

    Args:
        pattern: N and M, int64 ``[2]`` on the CPU. Compiled code would be made anew for other
            numbers, but not for other values of a tensor.

    Returns:
        The ternary weight, on CUDA as :func:`two_bits`, and γ.
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


def _ternarize(
    weight: Tensor, pattern: Tensor, shard_sizes: list[int], order: str, mask_source: str
) -> tuple[Tensor, Tensor]:
    derive = two_bits if weight.is_cuda else ternarize
    return derive(
        weight, Pattern(*pattern.tolist()), _method(order, mask_source), tuple(shard_sizes)
    )


@lru_cache
def _method(order: str, mask_source: str) -> Method:
    """Kept: to check its fields took a quarter of a large model's forward."""
    return Method(order=order, mask_source=mask_source)  # type: ignore[arg-type]


def _fake_ternarize(
    weight: Tensor, pattern: Tensor, shard_sizes: list[int], order: str, mask_source: str
) -> tuple[Tensor, Tensor]:
    length, dtype = weight.shape[-1], torch.int8
    if weight.is_cuda:
        length, dtype = two_bit.packed_length(length), torch.uint8
    return (
        torch.empty((*weight.shape[:-1], length), dtype=dtype, device=weight.device),
        weight.new_empty((*weight.shape[:-2], max(1, len(shard_sizes))), dtype=torch.float32),
    )


def _kept(weight: Tensor, pattern: Tensor, shard_sizes: list[int], mask_source: str) -> Tensor:
    method, now = _method("quant-then-mask", mask_source), Pattern(*pattern.tolist())
    mask = method_mask(weight, now, method, tuple(shard_sizes))
    return nm_mask(weight, now) if mask is None else mask


def _fake_kept(weight: Tensor, *_: object) -> Tensor:
    return torch.empty(weight.shape, dtype=torch.bool, device=weight.device)


TERNARIZE = (
    "ternarize(Tensor weight, Tensor pattern, int[] shard_sizes, str order, str mask_source) "
    "-> (Tensor, Tensor)"
)
KEPT = "kept_weights(Tensor weight, Tensor pattern, int[] shard_sizes, str mask_source) -> Tensor"
for device in ("CPU", "CUDA"):
    register(TERNARIZE, _ternarize, _fake_ternarize, device)
    register(KEPT, _kept, _fake_kept, device)
