"""Whether a module may be passed over when others compute what it computes."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_called_plainly(module: nn.Module) -> bool:
    """Whether a call runs the forward of the module's class and nothing else.

    Hooks want to be called, and so does a forward that somebody put on the instance, as libraries
    do that move weights between devices.
    """
    return "forward" not in module.__dict__ and not any(getattr(module, hooks) for hooks in HOOKS)


def runs_plainly_inside(owners: Iterable[nn.Module]) -> bool:
    """Whether that is so of every module inside these; the owners themselves are called.

    For a compiler's trace, behind ``torch.compiler.assume_constant_result``: in the graph each
    hook's absence would be a guard of every token. Ask of all owners at once, because one graph
    serves layers that are alike.
    """
    return all(
        is_called_plainly(inside)
        for owner in list(owners)
        for inside in owner.modules()
        if inside is not owner
    )
