"""Base of the packed modules: stored bytes, and the compute layout prepared from them.

A packed module's state dict is what a packed directory stores: for each ternary weight the bytes
of a storage format, under the name that the master weight had, and ``<name>_scale`` in float32.
Keeping the master weight's name makes a reader that does not know the format fail on the shape
instead of leaving the weight random.

The storage is chosen for size, the compute layout for the device, so they are different things: the
layout is derived at the first use and dropped when the module moves. Only one of them is kept. Once
the layout is there the stored bytes go. Whoever asks for
them, to save the model or to move it, gets them packed again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparse_bitnet.core import DENSE, PackedFormatError, Pattern, check_row, row_scale
from sparse_bitnet.formats import StorageName, storage
from sparse_bitnet.formats.rows import chunks
from sparse_bitnet.kernels import quantize_activations
from sparse_bitnet.kernels.registry import TernaryWeight, integer_linear, ternary_linear
from sparse_bitnet.nn.sparse_bit_linear import output_dtype


@dataclass(frozen=True)
class PackedSpec:
    """Storage, pattern and activation bits of a packed module.

    Attributes:
        storage: name of the format of the bytes.
        pattern: N:M along ``in`` that every weight of the module keeps.
        activation_bits: int8 absmax or int4 absmean activations.
        shard_sizes: rows of each logical matrix fused into a linear layer's ``out``, one γ each.
    """

    storage: StorageName = "two-bit"
    pattern: Pattern = DENSE
    activation_bits: Literal[8, 4] = 8
    shard_sizes: tuple[int, ...] = ()


def find_violation(ternary: Tensor, pattern: Pattern) -> str | None:
    """The first group of int8 ``[..., out, in]`` with more than N non-zeros, in words; None if all
    keep N:M.

    Raises:
        PatternError: if M does not divide ``in``.
    """
    if pattern.is_dense:
        return None
    pattern.check_divides(ternary.shape[-1])
    for first, rows in chunks(ternary):
        used = (rows != 0).view(torch.uint8).unflatten(-1, (-1, pattern.m)).unbind(-1)
        counts = sum(used[1:], used[0])
        wrong = counts > pattern.n
        if wrong.any():
            row, group = wrong.nonzero()[0].tolist()
            index = torch.unravel_index(torch.tensor(first + row), ternary.shape[:-1])
            place = tuple(map(int, index))
            return (
                f"row {place[0] if len(place) == 1 else place} has {int(counts[row, group])} "
                f"non-zeros in the group from input {group * pattern.m} on"
            )
    return None


class StoredModule(nn.Module):
    """Base of modules that hold a stored format: integers, and scales in float32, as buffers.

    For inference only: there are no parameters, and no gradients.

    Attributes:
        where: the module's name in its model, for error messages.
    """

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def exact_buffers(self) -> list[str]:
        """Names of the buffers whose dtype is that of the format."""
        return [
            name
            for name, buffer in self._buffers.items()
            if buffer is not None and (name.endswith("_scale") or not buffer.is_floating_point())
        ]

    def check(self) -> None:
        """Refuse scales that packing never writes.

        Raises:
            PackedFormatError: naming the module and the place.
        """
        for name, scale in self.named_buffers(recurse=False):
            if name.endswith("_scale") and not bool((torch.isfinite(scale) & (scale > 0)).all()):
                raise PackedFormatError(
                    f"{self.where}.{name}: a scale is not a positive number; the file was edited "
                    "or damaged, pack the model again"
                )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredModule:
        """Let the module move, but keep bytes as bytes and scales in float32.

        ``model.to(bfloat16)`` or ``model.half()`` would round the scales and ``model.type(…)`` turn
        the bytes into floats.
        """
        before = {name: self.get_buffer(name) for name in self.exact_buffers()}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self.get_buffer(name)
            if new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class PackedModule(StoredModule, ABC):
    """Base of the packed modules.

    Attributes:
        spec: format, pattern and activation bits.
        weight_shapes: name → shape ``[..., out, in]`` of the ternary weights.
    """

    def __init__(self, spec: PackedSpec, where: str) -> None:
        super().__init__(where)
        self.spec = spec
        self.weight_shapes: dict[str, tuple[int, ...]] = {}
        self._storage = storage(spec.storage)
        self._prepared: dict[str, Any] = {}
        self.register_load_state_dict_pre_hook(_expect_bytes)
        self.register_load_state_dict_post_hook(_forget_prepared)

    @abstractmethod
    def shard_sizes_of(self, name: str) -> tuple[int, ...]:
        """Rows of each logical matrix fused into that weight; empty for one matrix."""

    @abstractmethod
    def prepare_weight(self, ternary: Tensor, scale: Tensor) -> TernaryWeight | list[TernaryWeight]:
        """What the module multiplies with: one weight, or one for each expert.

        Args:
            ternary: int8 ``[..., out, in]``.
            scale: of each row, float32 ``[..., out]``.
        """

    def _add_weight(self, name: str, *shape: int, device: torch.device | str | None) -> None:
        """Register the bytes and the scales of a weight of that shape ``[..., out, in]``."""
        shard_sizes = self.shard_sizes_of(name)
        self.spec.pattern.check_divides(shape[-1], f"{self.where}.{name} {shape}")
        check_row(shape[-1], f"{self.where}.{name}")
        self.weight_shapes[name] = shape
        stored = (*shape[:-1], self._storage.packed_length(shape[-1]))
        self.register_buffer(name, torch.empty(stored, dtype=torch.uint8, device=device))
        scale = torch.empty(
            (*shape[:-2], max(1, len(shard_sizes))), dtype=torch.float32, device=device
        )
        self.register_buffer(f"{name}_scale", scale)

    def store(self, name: str, ternary: Tensor, scale: Tensor) -> None:
        """Pack a ternary weight (int8 ``[..., out, in]``) and keep its scales ``[..., shards]``.

        Raises:
            WeightError: if the weight is not ternary.
        """
        self._buffers[name] = self._storage.pack(ternary, f"{self.where}.{name}")
        self._buffers[f"{name}_scale"] = scale.detach().float().clone()
        self._prepared.clear()

    def unpack(self, name: str) -> Tensor:
        """The ternary weight: int8 ``[..., out, in]``.

        Raises:
            PackedFormatError: if the bytes stand for no ternary weights, or for such that break the
                pattern.
        """
        if self._buffers[name] is None:
            return _unpacked(self._prepared[name])
        where = f"{self.where}.{name}"
        ternary = self._storage.unpack(self.get_buffer(name), self.weight_shapes[name][-1], where)
        violation = find_violation(ternary, self.spec.pattern)
        if violation:
            raise PackedFormatError(
                f"{where}: {violation}, but its pattern is {self.spec.pattern}; the file was "
                "edited or damaged, pack the model again"
            )
        return ternary

    def check(self) -> None:
        """Refuse bytes or scales that packing never writes, without unpacking.

        Raises:
            PackedFormatError: naming the module and the place.
        """
        super().check()
        for name, shape in self.weight_shapes.items():
            if self._buffers[name] is not None:
                self._storage.check(self.get_buffer(name), shape[-1], f"{self.where}.{name}")

    @torch.compiler.disable
    def prepare(self) -> None:
        """Derive what products compute with, now instead of at the first use.

        Call it before ``torch.compile``, so that the graph is not broken here.
        """
        for name, shape in self.weight_shapes.items():
            if name in self._prepared:
                continue
            scale = self.get_buffer(f"{name}_scale")
            rows = row_scale(scale, self.shard_sizes_of(name), shape[-2])
            self._prepared[name] = self.prepare_weight(self.unpack(name), rows)
            self._buffers[name] = None

    def _stored(self, name: str) -> Tensor:
        """The stored bytes of a weight, packed again from the compute layout if they are gone."""
        if self._buffers[name] is None:
            return self._storage.pack(_unpacked(self._prepared[name]), f"{self.where}.{name}")
        return self.get_buffer(name)

    def _restore(self) -> None:
        for name in self._prepared:
            self._buffers[name] = self._stored(name)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._prepared:
            destination[prefix + name] = self._stored(name)

    def prepared(self, name: str) -> Any:
        """What :meth:`prepare_weight` made of that weight, derived if it is not yet."""
        if name not in self._prepared:
            self.prepare()
        return self._prepared[name]

    def product(self, x: Tensor, weight: TernaryWeight, bias: Tensor | None) -> Tensor:
        """The product with a prepared weight, in the dtype that a linear layer would return."""
        dtype, bits = output_dtype(x), self.spec.activation_bits
        if bits == 8:
            return ternary_linear(x, weight, bias, dtype)
        return integer_linear(*quantize_activations(x, bits), weight, bias, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        self._restore()
        super()._apply(fn, recurse)
        self._prepared.clear()
        return self


def _unpacked(layout: Any) -> Tensor:
    """int8 ``[..., out, in]`` of what :meth:`PackedModule.prepare_weight` gave."""
    if isinstance(layout, list):
        return torch.stack([weight.unpack() for weight in layout])
    ternary: Tensor = layout.unpack()
    return ternary


def _expect_bytes(module: nn.Module, *_: object) -> None:
    assert isinstance(module, PackedModule)
    module._restore()


def _forget_prepared(module: nn.Module, _keys: object) -> None:
    assert isinstance(module, PackedModule)
    module._prepared.clear()


def prepare(model: nn.Module) -> None:
    """Derive the compute layout of every packed module of a model, for example to compile it.

    Raises:
        PackedFormatError: if stored weights break their pattern.
    """
    for module in model.modules():
        if isinstance(module, PackedModule):
            module.prepare()
