"""Hidden states of some decoder blocks, for a student to come near its teacher's.

Beside the logits, the outputs of single blocks are compared: the mean over tokens of
‖student − teacher‖² / ‖teacher‖². A few tokens have activations a thousand times those of others
(Sun et al., arXiv 2402.17762); relative to each token's own size none of them decides the sum.
Forward hooks keep the outputs, which autograd (or activation checkpointing, as the next block's
input) keeps anyway, so what this adds in memory is the teacher's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparse_bitnet.core import ConfigError
from sparse_bitnet.data.loader import IGNORED


class HiddenStates:
    """Keeps the outputs of some blocks from each forward pass until they are taken.

    Args:
        blocks: of the decoder.
        numbers: which of them, from 0.
        whose: "student" or "teacher"; those of a student are kept in training mode only.

    Raises:
        ConfigError: for a block that there is not.
    """

    def __init__(self, blocks: Sequence[nn.Module], numbers: Iterable[int], whose: str) -> None:
        self._numbers = list(numbers)
        self._kept: dict[int, Tensor] = {}
        for number in self._numbers:
            if not 0 <= number < len(blocks):
                raise ConfigError(
                    f"teacher.hidden_layers: the {whose} has blocks 0 to {len(blocks) - 1}, and "
                    f"no {number}"
                )
        always = whose == "teacher"
        self._handles = [
            blocks[number].register_forward_hook(self._hook(number, always))
            for number in self._numbers
        ]

    def _hook(self, number: int, always: bool) -> Any:
        kept = self._kept  # a plain dict, which compiled code can write to

        def keep(module: nn.Module, _args: Any, output: Any) -> None:
            if always or module.training:
                kept[number] = output[0] if isinstance(output, tuple) else output

        return keep

    def take(self) -> list[Tensor]:
        """The outputs ``[..., features]`` of the last forward pass, which are no longer kept."""
        taken = [self._kept[number] for number in self._numbers]
        self._kept.clear()
        return taken

    def remove(self) -> None:
        self._kept.clear()
        for handle in self._handles:
            handle.remove()


def hidden_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    labels: Tensor,
    divisor: Tensor | None = None,
) -> Tensor:
    """Mean over blocks and labelled tokens of ‖student − teacher‖² / ‖teacher‖², float32.

    Args:
        student, teacher: ``[sequences, length, features]`` of each block.
        labels: int64 ``[sequences, length]``; tokens of −100 do not count.
        divisor: by how many labels the sum is divided; by default by all tokens.
    """
    counted = labels != IGNORED
    total = torch.zeros((), device=labels.device)
    for own, other in zip(student, teacher, strict=True):
        exact = other.float()
        size = exact.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        apart = (own.float() - exact).square().sum(-1) / size
        total = total + apart.masked_fill(~counted, 0).sum()
    return total / len(student) / (labels.numel() if divisor is None else divisor)
