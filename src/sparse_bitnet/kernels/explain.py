"""The verb ``kernels``: which backend serves what on a device, and why."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from sparse_bitnet.core.errors import ConfigError
from sparse_bitnet.core.pattern import Pattern
from sparse_bitnet.core.ternary import row_scale
from sparse_bitnet.kernels import native, tuning
from sparse_bitnet.kernels.dispatch import Choice, choose, without_triton
from sparse_bitnet.kernels.platform import runs_triton, usable_device
from sparse_bitnet.kernels.ternarize import ternarize
from sparse_bitnet.kernels.weight import prepare


@dataclass(frozen=True)
class Explanation:
    """What serves a set of layers on one device; its text is a table."""

    device: str
    remembered_in: str | None
    rows: list[tuple[str, str, int, Choice]]
    """``(shape, pattern, tokens, choice)``."""

    def __str__(self) -> str:
        choices = {(choice.backend, choice.why) for *_, choice in self.rows}
        if len(choices) == 1 and len(self.rows) > 1:
            backend, why = choices.pop()
            return f"{self.device}: every layer is served by {backend} ({why})"
        lines = [f"{self.device}", f"{'layer':>13}  pattern  tokens  backend    why"]
        for shape, pattern, tokens, choice in self.rows:
            lines.append(f"{shape:>13}  {pattern:7}  {tokens:6}  {choice.backend:9}  {choice.why}")
        if self.remembered_in:
            lines.append(f"measurements are kept in {self.remembered_in}")
        return "\n".join(lines)


def explain(
    shapes: tuple[str, ...] = ("37888x3584", "3584x18944", "4608x3584", "3584x3584"),
    tokens: tuple[int, ...] = (1, 8, 32, 512, 4096),
    patterns: tuple[str, ...] = ("6:8", "2:4", "dense"),
    device: str | None = None,
) -> Explanation:
    """Which backend serves layers of these shapes, and why; measures what is not remembered.

    Args:
        shapes: OUTxIN of the layers; those of a 7B Qwen2.5 if left out.
        tokens: token counts.
        patterns: N:M or dense.
        device: the first CUDA device if left out, or CPU where there is none.

    Raises:
        ConfigError: if a shape is not written OUTxIN, a token count is below 1, or the device is
            not there.
        PatternError: if a pattern does not fit a shape.
    """
    where = usable_device(device)
    if any(count < 1 for count in tokens):
        raise ConfigError(f"tokens {min(tokens)} is no count of tokens; it has to be 1 or more")
    rows = []
    for shape in shapes:
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", shape)
        if not match:
            raise ConfigError(f"shape {shape!r} is not understood: write OUTxIN as in 37888x3584")
        out, columns = int(match[1]), int(match[2])
        for name in patterns:
            pattern = Pattern.parse(name)
            pattern.check_divides(columns, f"layer {shape}")
            if not runs_triton(torch.empty(0, device=where)):
                packed = where.type == "cpu" and native.path() != native.REFERENCE
                choice = without_triton(where, packed)
                rows += [(shape, name, count, choice) for count in tokens]
                continue
            ternary, scale = ternarize(torch.randn(out, columns, device=where), pattern)
            weight = prepare(ternary, row_scale(scale, (), out), pattern)
            rows += [(shape, name, count, choose(weight, count)) for count in tokens]
    on_gpu = where.type == "cuda"
    alone = " (no NVIDIA GPU here)" if device is None else ""
    return Explanation(
        device=torch.cuda.get_device_name(where) if on_gpu else f"{where}{alone}",
        remembered_in=str(tuning.cache_file(where)) if on_gpu else None,
        rows=rows,
    )
