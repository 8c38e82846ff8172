"""The verb ``bench``: whole models on the user's own machine, one table and one JSON file."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from sparse_bitnet import console, files
from sparse_bitnet.bench.inference import KINDS, Case, Row, measure
from sparse_bitnet.core import ConfigError
from sparse_bitnet.kernels import native
from sparse_bitnet.kernels.environment import cpu_name, measured_on

SMALL_LAYERS, SMALL_VOCABULARY = 2, 4096


def bench(
    preset: str | None = None,
    *,
    prefill: tuple[str, ...] | None = None,
    decode: tuple[int, ...] | None = None,
    context: int = 512,
    kinds: tuple[str, ...] = KINDS,
    head: str = "bf16",
    repeats: int = 7,
    out: Path | None = None,
) -> str:
    """Time prefill and decode of a model shape with random weights, ternary beside BF16.

    Kernels are measured once a shape and remembered, so a second run starts sooner.

    Args:
        preset: a model shape; qwen2.5-7b on a GPU, two layers of qwen2.5-0.5b without one.
        prefill: SEQUENCESxTOKENS; 1x512 and 4x4096 on a GPU, 1x128 without one.
        decode: batch sizes; 1, 8 and 32 on a GPU, 1 without one.
        context: tokens in the cache while decoding.
        kinds: bf16 and patterns.
        head: bf16 or int8, of the ternary models.
        repeats: of every kind, in turns.
        out: write all repeats to this JSON file too, with versions, commit, driver and clocks.

    Raises:
        ConfigError: for an argument out of range.
    """
    on_gpu = torch.cuda.is_available()
    if head not in ("bf16", "int8"):
        raise ConfigError(f"bench: head is {head!r}; choose bf16 or int8")
    if repeats < 1 or context < 1:
        raise ConfigError("bench: repeats and context have to be at least 1")
    if any(batch < 1 for batch in decode or ()):
        raise ConfigError(f"bench: decode {min(decode or ())} is no batch; it has to be 1 or more")
    if prefill is None:
        prefill = ("1x512", "4x4096") if on_gpu else ("1x128",)
    if decode is None:
        decode = (1, 8, 32) if on_gpu else (1,)
    cases = [_prefill(text, head) for text in prefill]
    cases += [Case("decode", batch, context, head) for batch in decode]
    if not on_gpu:
        console.say(
            f"no NVIDIA GPU here: {SMALL_LAYERS} layers of the model in float32 on the CPU "
            f"({native.explanation()}); bf16 in the table stands for full precision"
        )
    rows: list[Row] = []
    for row in measure(
        preset or ("qwen2.5-7b" if on_gpu else "qwen2.5-0.5b"),
        cases,
        kinds=kinds,
        repeats=repeats,
        layers=None if on_gpu else SMALL_LAYERS,
        vocabulary=None if on_gpu else SMALL_VOCABULARY,
        compiled=on_gpu,
    ):
        rows.append(row)
        console.say(str(row))
        if out is not None:
            values = {"environment": measured_on(), "rows": [row.to_dict() for row in rows]}
            files.write_text(out, json.dumps(values, indent=1) + "\n")
    return table(rows)


def table(rows: list[Row]) -> str:
    """Tokens a second, and how many times BF16's, as text."""
    kinds = list(dict.fromkeys(kind for row in rows for kind in row.microseconds))
    lines = [f"{_device()}, {rows[0].preset}" if rows else _device()]
    lines.append(f"{'tokens/s':28}" + "".join(f"{kind:>20}" for kind in kinds))
    for row in rows:
        cells = "".join(f"{row.told(kind):>20}" for kind in kinds)
        lines.append(f"{row.case!s:28}{cells}")
    return "\n".join(lines)


def _prefill(text: str, head: str) -> Case:
    batch, _, length = text.partition("x")
    if not (batch.isdigit() and length.isdigit() and int(batch) and int(length) > 1):
        raise ConfigError(
            f"bench: prefill {text!r} is not understood: write SEQUENCESxTOKENS as in 4x4096"
        )
    return Case("prefill", int(batch), int(length), head)


def _device() -> str:
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU: {cpu_name()}"
