"""Base of the packed modules: stored bytes, and the compute layout prepared from them.

A packed module's state dict is what a packed directory stores: for each ternary weight the bytes
of a storage format, under the name that the master weight had, and ``<name>_scale`` in float32.
Keeping the master weight's name makes a reader that does not know the format fail on the shape
instead of leaving the weight random.

The storage is chosen for size, the compute layout for the device, so they are different things: the
layout is derived at the first use and dropped when the module moves. Only one of them is kept. Once
the layout is there the stored bytes go (on a CPU most layouts are these bytes). Whoever asks for
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
from sparse_bitnet.kernels.registry import TernaryWeight


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


@dataclass(frozen=True)
class GroupViolation:
    """A group that breaks N:M: ``count`` non-zeros from ``first_input`` on in ``row``."""

    row: tuple[int, ...]
    first_input: int
    count: int

    def __str__(self) -> str:
        row = self.row[0] if len(self.row) == 1 else self.row
        return f"row {row} has {self.count} non-zeros in the group from input {self.first_input} on"


def find_violation(ternary: Tensor, pattern: Pattern) -> GroupViolation | None:
    """The first group of int8 ``[..., out, in]`` with more than N non-zeros; None if all keep N:M.

    Raises:
        PatternError: if M does not divide ``in``.
    """
    if pattern.is_dense:
        return None
    pattern.check_divides(ternary.shape[-1])
    for first, rows in chunks(ternary):
        used = (rows != 0).view(torch.uint8).unflatten(-1, (-1, pattern.m)).unbind(-1)
        counts = used[0].clone()
        for lane in used[1:]:
            counts += lane
        wrong = counts > pattern.n
        if wrong.any():
            row, group = wrong.nonzero()[0].tolist()
            place = torch.unravel_index(torch.tensor(first + row), ternary.shape[:-1])
            return GroupViolation(
                tuple(int(index) for index in place), group * pattern.m, int(counts[row, group])
            )
    return None


@dataclass(frozen=True)
class _Weight:
    shape: tuple[int, ...]  # [..., out, in]
    shard_sizes: tuple[int, ...]


class PackedModule(nn.Module, ABC):
    """Base of the packed modules. For inference only: there are no parameters, and no gradients.

    Attributes:
        spec: format, pattern and activation bits.
        where: the module's name in its model, for error messages.
    """

    def __init__(self, spec: PackedSpec, where: str) -> None:
        super().__init__()
        self.spec, self.where = spec, where
        self._storage = storage(spec.storage)
        self._weights: dict[str, _Weight] = {}
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
        self._weights[name] = _Weight(shape, shard_sizes)
        stored = (*shape[:-1], self._storage.packed_length(shape[-1]))
        self.register_buffer(name, torch.empty(stored, dtype=torch.uint8, device=device))
        scale = torch.empty(
            (*shape[:-2], max(1, len(shard_sizes))), dtype=torch.float32, device=device
        )
        self.register_buffer(f"{name}_scale", scale)

    @property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape ``[..., out, in]`` of the ternary weights."""
        return {name: weight.shape for name, weight in self._weights.items()}

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
        ternary = self._storage.unpack(self.get_buffer(name), self._weights[name].shape[-1], where)
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
        for name, weight in self._weights.items():
            where = f"{self.where}.{name}"
            if self._buffers[name] is not None:
                self._storage.check(self.get_buffer(name), weight.shape[-1], where)
            scale = self.get_buffer(f"{name}_scale")
            if not bool((torch.isfinite(scale) & (scale > 0)).all()):
                raise PackedFormatError(
                    f"{where}_scale: a scale is not a positive number; the file was edited or "
                    "damaged, pack the model again"
                )

    @torch.compiler.disable
    def prepare(self) -> None:
        """Derive what products compute with, now instead of at the first use.

        Call it before ``torch.compile``, so that the graph is not broken here.
        """
        for name, weight in self._weights.items():
            if name in self._prepared:
                continue
            scale = self.get_buffer(f"{name}_scale")
            rows = row_scale(scale, weight.shard_sizes, weight.shape[-2])
            self._prepared[name] = self.prepare_weight(self.unpack(name), rows)
            if not _shares_memory(self._prepared[name], self.get_buffer(name)):
                self._buffers[name] = None

    def _restore(self) -> None:
        """Pack stored bytes that are gone from the compute layout again."""
        for name, weight in self._prepared.items():
            if self._buffers[name] is None:
                self._buffers[name] = self._storage.pack(_unpacked(weight), f"{self.where}.{name}")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, weight in self._prepared.items():
            if self._buffers[name] is None:
                where = f"{self.where}.{name}"
                destination[prefix + name] = self._storage.pack(_unpacked(weight), where)

    def prepared(self, name: str) -> Any:
        """What :meth:`prepare_weight` made of that weight, derived if it is not yet."""
        if name not in self._prepared:
            self.prepare()
        return self._prepared[name]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        """Let the module move, but keep bytes as bytes and scales in float32.

        ``model.to(bfloat16)`` or ``model.half()`` would round the scales and ``model.type(…)`` turn
        the bytes into floats.
        """
        self._restore()
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name in self._weights:
            for key in (name, f"{name}_scale"):
                old, new = before[key], self._buffers[key]
                assert old is not None and new is not None
                if new.dtype != old.dtype:
                    self._buffers[key] = old.to(new.device)
        self._prepared.clear()
        return self


def _weights_of(layout: Any) -> list[TernaryWeight]:
    return layout if isinstance(layout, list) else [layout]


def _unpacked(layout: Any) -> Tensor:
    """int8 ``[..., out, in]`` of what :meth:`PackedModule.prepare_weight` gave."""
    if isinstance(layout, list):
        return torch.stack([weight.unpack() for weight in layout])
    ternary: Tensor = layout.unpack()
    return ternary


def _shares_memory(layout: Any, stored: Tensor) -> bool:
    memory = stored.untyped_storage().data_ptr()
    return any(w.packed.untyped_storage().data_ptr() == memory for w in _weights_of(layout))


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
