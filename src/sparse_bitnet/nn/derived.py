"""Compute weights that are derived from master weights once per optimizer step.

A converted module keeps its master weight as an ordinary fp32 parameter and, beside it, buffers
that a product can use (the ternary weight, the mask). Deriving them costs a pass over the weight,
so it happens when the weight has changed, not in every forward:

- after ``optimizer.step()`` of any ``torch.optim.Optimizer`` that holds the weight (a global hook);
- after ``load_state_dict``, ``.to(...)`` and a change of pattern;
- in an eager forward, if the weight's version counter says that it was edited in place;
- when asked: :func:`refresh`.

A compiled forward contains none of these checks, so it never breaks the graph and is never
recompiled for a new pattern: the derived buffers are its inputs. Under FSDP2 the parameter is a
``DTensor`` shard between forwards and its step only marks the buffers stale; the first forward
after it finds the gathered weight and derives.

Edits through ``weight.data`` are invisible to PyTorch's version counter: call :func:`refresh` after
them.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparse_bitnet.core import Method, Pattern

_live: weakref.WeakSet[DerivedModule] = weakref.WeakSet()


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

    def _track(self, pattern: Pattern, method: Method) -> None:
        """Last line of a constructor but for ``refresh``: from here on steps are followed."""
        self.pattern, self.method = pattern, method
        # The pattern to return to when a schedule goes from dense to sparse; None follows the
        # schedule's own pattern.
        self.own_pattern: Pattern | None = None
        self._derived_from: tuple[int, ...] | None = None
        self.register_load_state_dict_post_hook(_refresh_after_load)
        _live.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _live.add(self)  # copies are made without __init__

    def set_pattern(self, pattern: Pattern) -> None:
        """Use another pattern from now on.

        Raises:
            PatternError: if M does not divide ``in``.
        """
        if pattern != self.pattern:
            for name, weight in self.master_parameters().items():
                pattern.check_divides(weight.shape[-1], name)
            self.pattern = pattern
            self.invalidate()
            self.refresh()

    def invalidate(self) -> None:
        """Mark the derived buffers stale."""
        self._derived_from = None

    def refresh(self) -> None:
        """Derive the buffers if the master weight has changed; nothing to do on shards or meta."""
        weights = self.master_parameters().values()
        if any(isinstance(weight, DTensor) or weight.is_meta for weight in weights):
            return
        versions = tuple(0 if weight.is_inference() else weight._version for weight in weights)
        if versions != self._derived_from:
            with torch.no_grad():
                self.derive()
            self._derived_from = versions

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DerivedModule:
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            # `model.to(bfloat16)` must not round a scale: scales are float32 by definition.
            if buffer is not None and buffer.is_floating_point():
                self._buffers[name] = buffer.float()
        self.invalidate()
        return self


def _refresh_after_load(module: nn.Module, _keys: object) -> None:
    assert isinstance(module, DerivedModule)
    module.invalidate()
    module.refresh()


def _refresh_after_step(
    optimizer: torch.optim.Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]
) -> None:
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for module in list(_live):
        if any(id(weight) in stepped for weight in module.master_parameters().values()):
            # A gathered FSDP2 weight keeps its version counter, so mark first and derive if we can.
            module.invalidate()
            module.refresh()


register_optimizer_step_post_hook(_refresh_after_step)
