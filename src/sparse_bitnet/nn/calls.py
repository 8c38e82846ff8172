"""Whether a module may be passed over when others compute what it computes."""

from __future__ import annotations

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_called_plainly(module: nn.Module) -> bool:
    """Whether a call runs the forward of the module's class and nothing else.

    Hooks want to be called, and so does a forward that somebody put on the instance, as libraries
    do that move weights between devices.
    """
    return "forward" not in module.__dict__ and not any(getattr(module, hooks) for hooks in HOOKS)
