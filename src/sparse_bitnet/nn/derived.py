"""Compute weights that are derived from master weights once per optimizer step.

A converted module keeps its master weight as an ordinary fp32 parameter and, beside it, buffers
that a product can use (the ternary weight, the mask). Deriving them costs a pass over the weight,
so it happens when the weight has changed, not in every forward:

- after ``optimizer.step()`` of any ``torch.optim.Optimizer`` that holds the weight (a global hook);
- after ``load_state_dict``, ``.to(...)`` and a change of pattern;
- in an eager forward, if the weight's version counter says that it was edited in place;
- when asked: :func:`refresh`.

A compiled forward contains none of these checks, so it never breaks the graph: the derived buffers
are its inputs, and a new pattern recompiles nothing (the full-precision twin once, when it turns
from dense to sparse).

Under FSDP2 parameters are ``DTensor`` shards when the optimizer steps. They are gathered once, one
weight at a time and in float32, to derive; that is a collective operation, which every rank
reaches in the same order. So a forward may gather them in bf16 without moving a mask or a scale.

Some edits outside an optimizer and ``load_state_dict`` go unseen: through ``weight.data``, of
shards, and any at all if the next forward is a compiled one. Call
:func:`sparse_bitnet.nn.refresh` after them.
"""

from __future__ import annotations

import itertools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparse_bitnet.core import ConfigError, Method, Pattern

LARGEST_STACKED = 2**20  # weights; above that a matrix of its own keeps a device busy

_live: weakref.WeakSet[DerivedModule] = weakref.WeakSet()
_serials = itertools.count()

# What a derived state came from: whether from shards, then identity and version of each weight.
# The identity sees a replaced parameter, whose version counter starts anew.
_Origin = tuple[bool, tuple[tuple[int, int], ...]]


class DerivedModule(nn.Module, ABC):
    """Base of the converted modules: a pattern, a method, and buffers derived from parameters."""

    pattern: Pattern
    method: Method

    @abstractmethod
    def master_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that buffers are derived from, by attribute name."""

    @abstractmethod
    def segments_of(self, name: str) -> tuple[int, ...]:
        """Rows of each logical matrix fused into that parameter; empty for one matrix."""

    @abstractmethod
    def derive(self) -> None:
        """Write the derived buffers from the master parameters, in place."""

    def derived(self, weight: Tensor) -> dict[str, Tensor] | None:
        """Derived buffers by name, of the one master weight or of a stack ``[count, out, in]``.

        None (the default) for a module whose weights cannot be stacked with those of others.
        """
        return None

    def _track(self, pattern: Pattern, method: Method) -> None:
        """Last line of a constructor but for ``refresh``: from here on steps are followed."""
        self.pattern, self.method = pattern, method
        # Compiled code may guard on this, but not on N and M, which a staircase changes often.
        self.is_dense = pattern.is_dense
        # The pattern to return to when a schedule goes from dense to sparse; None follows the
        # schedule's own pattern.
        self.own_pattern: Pattern | None = None
        self._derived_from: _Origin | None = None
        self.register_load_state_dict_post_hook(_refresh_after_load)
        self._serial = next(_serials)
        _live.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._serial = next(_serials)
        _live.add(self)  # copies are made without __init__

    def set_pattern(self, pattern: Pattern) -> None:
        """Use another pattern from now on.

        Raises:
            PatternError: if M does not divide ``in``.
        """
        if pattern != self.pattern:
            for name, weight in self.master_parameters().items():
                pattern.check_divides(weight.shape[-1], name)
            self.pattern, self.is_dense = pattern, pattern.is_dense
            self.invalidate()
            self.refresh()

    def invalidate(self) -> None:
        """Mark the derived buffers stale."""
        self._derived_from = None

    def refresh(self) -> None:
        """Derive the buffers if the master weight has changed; nothing to do on meta.

        Where the master weight is sharded, every rank must call.
        """
        weights = list(self.master_parameters().values())
        if any(weight.is_meta for weight in weights):
            return
        sharded = any(isinstance(weight, DTensor) for weight in weights)
        if self._derived_from is not None and self._derived_from[0] and not sharded:
            return  # what a forward sees are gathered copies of the shards derived from
        origin = (sharded, tuple((id(weight), _version(weight)) for weight in weights))
        if origin != self._derived_from:
            with torch.no_grad():
                self.derive()
            self._derived_from = origin

    def _fill(self, name: str, value: Tensor) -> None:
        """Write a derived buffer in place, or make it if there is none but on meta."""
        buffer = self._buffers[name]
        assert buffer is not None
        if buffer.is_meta and not value.is_meta:
            self._buffers[name] = value.to(buffer.dtype)
        else:
            buffer.copy_(value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DerivedModule:
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            # `model.to(bfloat16)` must not round a scale: scales are float32 by definition.
            if buffer is not None and buffer.is_floating_point():
                self._buffers[name] = buffer.float()
        self.invalidate()
        # Not on shards: `.to_empty()` has nothing to derive from, and gathering is collective.
        if not any(isinstance(weight, DTensor) for weight in self.master_parameters().values()):
            self.refresh()
        return self


def whole(weight: Tensor) -> Tensor:
    """A weight as one plain tensor, gathered if it is sharded (every rank must call).

    Raises:
        ConfigError: if it holds no values, as under DeepSpeed ZeRO-3.
    """
    if weight.numel() == 0:
        raise ConfigError(
            "a master weight holds no values: an engine has partitioned it (DeepSpeed ZeRO-3); "
            "shard with FSDP2 (fully_shard), which ternary weights are derived under"
        )
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


def _refresh_after_load(module: nn.Module, _keys: object) -> None:
    assert isinstance(module, DerivedModule)
    module.invalidate()
    module.refresh()


# Kept out of a compiled `optimizer.step`: it is bookkeeping, not arithmetic.
@torch._disable_dynamo
def _refresh_after_step(
    optimizer: torch.optim.Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]
) -> None:
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    changed = [
        module
        for module in list(_live)
        if any(id(weight) in stepped for weight in module.master_parameters().values())
    ]
    # In one order on every rank: deriving from shards is a collective operation.
    changed.sort(key=lambda module: module._serial)
    for module in changed:
        module.invalidate()  # fused optimizers do not raise the version counter
    _derive_stacked([m for m in changed if all(p.is_cuda for p in m.master_parameters().values())])
    for module in changed:
        module.refresh()


@torch.no_grad()
def _derive_stacked(modules: list[DerivedModule]) -> None:
    """Derive small weights of one shape together, for devices where launching is what costs.

    A model of forty small matrices so takes some two hundred kernels a step instead of thousands.
    """
    stacks: dict[Any, list[DerivedModule]] = {}
    for module in modules:
        weight, *others = module.master_parameters().values()
        plain = not (others or isinstance(weight, DTensor) or weight.is_meta)
        if plain and weight.numel() <= LARGEST_STACKED:
            kind = (type(module), weight.shape, weight.device, weight.dtype)
            choices = (module.pattern, module.method, module.segments_of("weight"))
            stacks.setdefault((*kind, *choices), []).append(module)
    for members in stacks.values():
        if len(members) < 2:
            continue
        weights: list[Tensor] = [*chain(*(m.master_parameters().values() for m in members))]
        values = members[0].derived(torch.stack(weights))
        if values is None:
            continue
        for name, stack in values.items():
            buffers = [module.get_buffer(name) for module in members]
            torch._foreach_copy_(buffers, list(stack.unbind(0)))
        for module, master in zip(members, weights, strict=True):
            module._derived_from = (False, ((id(master), _version(master)),))


register_optimizer_step_post_hook(_refresh_after_step)
