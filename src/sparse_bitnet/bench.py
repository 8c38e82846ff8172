"""The verb ``bench``: prefill and decode speed of model directories on this machine.

Models of random weights and a published shape are timed by ``benchmarks/inference.py``.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel

from sparse_bitnet.console import progress
from sparse_bitnet.core import ConfigError
from sparse_bitnet.nn import frozen
from sparse_bitnet.packed.load import DType, load
from sparse_bitnet.train.model import context_length


def bench(
    models: tuple[Path, ...],
    *,
    batch: int = 1,
    prompt: int = 512,
    new: int = 64,
    repeats: int = 5,
    dtype: DType | None = None,
    device: str | None = None,
    compile: bool = False,
) -> str:
    """Tokens a second of one or several models, which take turns.

    Args:
        models: directories, packed, trained or of Hugging Face, all loaded at once.
        batch: sequences at once.
        prompt: tokens of each prompt.
        new: tokens that are decoded behind it.
        repeats: of every model; the median counts.
        dtype: to compute in; the stored one when left out.
        device: the GPU when left out, if there is one.
        compile: on a GPU, compile the decoder first: fewer kernels a token.

    Raises:
        ConfigError: for a number below 1, or beyond a model's context.
        PackedFormatError, CheckpointError: if a directory cannot be loaded.
    """
    if not models:
        raise ConfigError("bench: give a model's directory, or several")
    for name, number in (("batch", batch), ("prompt", prompt), ("new", new), ("repeats", repeats)):
        if number < 1:
            raise ConfigError(f"bench: --{name} is {number}; it has to be 1 or more")
    loaded = {
        str(path): load(path, dtype=dtype, device=device, compile=compile)[0] for path in models
    }
    for name, model in loaded.items():
        room = context_length(model.config)
        if room is not None and prompt + new + 1 > room:
            raise ConfigError(f"bench: {prompt} + {new} tokens exceed {name}'s context of {room}")
        if model.generation_config is not None:
            model.generation_config.eos_token_id = None
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in loaded}
    with progress("bench", (1 + repeats) * len(loaded)) as task:
        for _ in range(1 + repeats):
            for name, model in loaded.items():
                times[name].append(_seconds(model, batch, prompt, new))
                task.advance(detail=name)
    width = max(map(len, loaded))
    lines = [f"{'tokens/s':{width}}  prefill {batch} × {prompt}  decode, batch {batch}"]
    for name, (_, *counted) in times.items():  # the first one warms up
        prefill, decode = (statistics.median(column) for column in zip(*counted, strict=True))
        rates = batch * prompt / prefill, batch * new / decode
        lines.append(f"{name:{width}}  {rates[0]:14,.0f}  {rates[1]:14,.0f}")
    return "\n".join(lines)


def _seconds(model: PreTrainedModel, batch: int, prompt: int, new: int) -> tuple[float, float]:
    """Of reading random prompts, and of ``new`` tokens after the first."""
    size = int(model.config.get_text_config().vocab_size)
    tokens = torch.randint(0, size, (batch, prompt), device=model.device)

    def seconds(count: int) -> float:
        started = time.perf_counter()
        with frozen(model):
            model.generate(  # type: ignore[operator]  # the mixin is not typed
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    first = seconds(1)
    return first, max(1e-9, seconds(1 + new) - first)
