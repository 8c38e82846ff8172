"""What a training step leaves to ``torch.compile`` instead of giving it to a kernel of ours.

A kernel of ours is opaque to the compiler: what it reads must lie in memory first. To quantize a
row by its largest magnitude is little work beside that, so in a compiled training step the compiler
gets it as plain operations and joins them to the norm, the SwiGLU product or its derivative that
makes the row, which then is never written in floating point.

Two consequences. Such a row is quantized before it would have been rounded to bf16, so an integer
may differ by one from eager mode's, as for any two orders of rounding. And what backward keeps is
the partitioner's choice: the integers, or nothing, where their floating-point source is kept anyway
for its own derivative and they are cheaper made again than read.
"""

from __future__ import annotations

from typing import Final

import torch

LONGEST_ROW: Final = 4096
"""Columns up to which the compiler gets a row.

It reads a row twice, the second time from cache, and computes what makes the row twice: on an H200
SwiGLU or its derivative over 11008 columns costs more that way than memory does.
"""

INDUCTOR_OPTIONS: Final[dict[str, str | int | bool]] = {
    "realize_reads_threshold": 8,
    "realize_opcount_threshold": 100,
}
"""For ``torch.compile`` of blocks with ternary layers.

By default the compiler writes an intermediate value to memory once more than four tensors or thirty
operations go into it. The sum of dX of q, k and v reads six (three products, three γ), and takes
more than thirty operations where fp8 brings a scale for each token. It is cheaper made twice.
"""


def cpu_options() -> dict[str, str | int | bool]:
    """Inductor's options for code on this CPU: the length of its vectors, in bits.

    It is the length that the compiler would choose. Named, it becomes part of the key of PyTorch's
    compile cache, which otherwise gives a processor the code of another one that shares the
    directory: code for 512 bits, compiled for 256, leaves half of its values unset.
    """
    bits = {"AVX2": 256, "AVX512": 512}.get(torch.backends.cpu.get_cpu_capability())
    return {} if bits is None else {"cpp.simdlen": bits}


def takes_rows(columns: int) -> bool:
    """Whether passes over rows of this length are left to the compiler; False in eager mode."""
    return torch.compiler.is_compiling() and columns <= LONGEST_ROW
