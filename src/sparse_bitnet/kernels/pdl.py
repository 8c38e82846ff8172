# mypy: disable-error-code="no-untyped-def"
"""Programmatic dependent launch (PDL): a kernel begins while the one ahead ends; Hopper on.

Decoding a token is a chain of kernels of a few microseconds. Launched one after the other, each
begins with an idle GPU: blocks start, addresses are computed, the first bytes come. With
PDL it does that while the kernel ahead still runs, and asks for its weights, which nobody writes;
then it waits until all that the kernel ahead wrote can be seen.

    kernel ahead   ─ blocks ─────────────────┤
    this one                ├ start, weights ┤ wait, activations, arithmetic ───┤
    next                                     ├ start, weights ──────────────────┤ wait …

Three rules make it safe, and PyTorch's compiler keeps them too (``platform.compile_options``):
before :func:`wait` a kernel reads nothing but weights (fetching a line into L2 is not reading it)
and writes nothing; every kernel waits; it lets the next one begin only after it has waited itself,
so whoever begins finds all but the kernel directly ahead of it complete. Weights are what nothing
in the chain writes: γ, biases and norms count as such, and whoever changes one in place does so in
no chain with its reader.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sparse_bitnet.kernels.platform import capability

OLDEST_CAPABILITY = (9, 0)
OFF: dict[str, Any] = {"PDL": False, "launch_pdl": False}
"""Launch options without PDL: the kernel begins when the one ahead of it has ended."""


@triton.jit
def wait(PDL: tl.constexpr):
    """Everything written ahead is visible from here on; the next kernel may begin."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def fetch(pointers, PDL: tl.constexpr):
    """Ask for the cache lines at these addresses; they arrive in L2 while others still compute."""
    if PDL:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [pointers],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def fetch_where(pointers, flags, PDL: tl.constexpr):
    """Of these cache lines those whose flag, a byte at an address too, is not zero.

    A flag that is written at the same moment makes a fetch too many or too few, no wrong number;
    it is read in assembly so that no compiler takes it for the value after the wait, and past the
    first level cache (cg), which would keep it for the read after the wait.
    """
    if PDL:
        tl.inline_asm_elementwise(
            "{.reg .pred p; .reg .u16 f; ld.global.cg.u8 f, [$2]; setp.ne.u16 p, f, 0; "
            "@p prefetch.global.L2 [$1]; mov.u32 $0, 0;}",
            "=r,l,l",
            [pointers.to(tl.int64), flags.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


def launch_options(tensor: Tensor) -> dict[str, Any]:
    """Keyword arguments of a launch on the tensor's device: PDL, and the launch attribute."""
    used = tensor.is_cuda and _serves(tensor.device.index)
    return {"PDL": True, "launch_pdl": True} if used else OFF


@cache
def _serves(device_index: int | None) -> bool:
    known = hasattr(tl.extra.cuda, "gdc_wait")
    return known and capability(device_index) >= OLDEST_CAPABILITY
