"""The verbs ``pack``, ``inspect`` and ``generate`` of the command line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import tyro

from sparse_bitnet.console import out, say
from sparse_bitnet.deploy import generate as generating
from sparse_bitnet.deploy import inspect as inspecting
from sparse_bitnet.deploy import packing
from sparse_bitnet.deploy.pretrained import DType
from sparse_bitnet.formats import StorageName


def pack(
    source: tyro.conf.Positional[Path],
    directory: tyro.conf.Positional[Path],
    *,
    storage: StorageName = "two-bit",
    dtype: DType | None = None,
    tokenizer: Path | None = None,
) -> None:
    """Write a trained model as a packed directory that transformers loads.

    Args:
        source: directory of the trained model (model/ of a run).
        directory: the packed directory to write.
        storage: two-bit is fastest to unpack; trits takes 1.6 bits a weight.
        dtype: of embeddings, norms, head and biases; the model's own when left out.
        tokenizer: directory of another tokenizer than the source's.
    """
    started = time.perf_counter()
    result = packing.pack(source, directory, storage=storage, dtype=dtype, tokenizer=tokenizer)
    out.print(str(result), markup=False)
    say(f"packed in {time.perf_counter() - started:.1f} s")


def inspect(
    directory: tyro.conf.Positional[Path],
    *,
    as_json: Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(name="json")] = False,
) -> None:
    """What a packed or trained directory holds, measured: patterns, zeros, bits, sizes.

    Args:
        directory: of the model.
        as_json: print JSON instead of a table.
    """
    report = inspecting.inspect(directory)
    if as_json:
        print(json.dumps(report.as_dict(), indent=1))
        return
    out.print(report.table())
    out.print()
    out.print(report.summary(), markup=False)


def generate(
    directory: tyro.conf.Positional[Path],
    prompt: tyro.conf.Positional[str],
    *,
    max_new_tokens: int = 200,
    sampling: tyro.conf.OmitArgPrefixes[generating.Sampling] = generating.Sampling(),  # noqa: B008
    dtype: DType | None = None,
    device: str | None = None,
) -> None:
    """Continue a prompt, streaming the text to the terminal.

    Args:
        directory: of a packed or trained model.
        prompt: the text to continue.
        max_new_tokens: stop after so many.
        sampling: how the next token is chosen.
        dtype: to compute in; the stored one when left out.
        device: the GPU when left out, if there is one.
    """
    print(prompt, end="", flush=True)
    generating.generate(
        directory,
        prompt,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        dtype=dtype,
        device=device,
        write=lambda text: print(text, end="", flush=True),
    )
    print()
