"""The verbs ``pack``, ``inspect`` and ``evaluate`` of the command line.

What a verb returns is its result, which the command line prints; what it prints itself has to
come earlier, or in another form.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from sparse_bitnet.console import out as console
from sparse_bitnet.console import say
from sparse_bitnet.evaluate import Comparison, Measurements, Report, measure
from sparse_bitnet.evaluate.scoring import default_window
from sparse_bitnet.formats import StorageName
from sparse_bitnet.packed import inspect as inspecting
from sparse_bitnet.packed import write
from sparse_bitnet.packed.load import DType, load_with_tokenizer
from sparse_bitnet.packed.write import HeadName, PackResult
from sparse_bitnet.train.dense import read_shape

AsJson = Annotated[bool, tyro.conf.arg(name="json")]
DEFAULT_MEASUREMENTS = Measurements()


def pack(
    model: Path,
    out: Path,
    *,
    storage: StorageName = "two-bit",
    head: HeadName = "float",
    dtype: DType | None = None,
    tokenizer: Path | None = None,
    check: bool = True,
    overwrite: bool = False,
) -> PackResult:
    """Write a trained model as a packed directory that transformers loads.

    Args:
        model: directory of the trained model (model/ of a run).
        out: the packed directory to write.
        storage: two-bit is fastest to unpack; trits takes 1.6 bits a weight.
        head: int8 halves the output head and a tied embedding; `evaluate` says what that costs.
        dtype: of embeddings, norms, head and biases; the model's own when left out.
        tokenizer: directory of another tokenizer than the model's.
        check: first compare each layer's result for a few tokens with that of its packed form.
        overwrite: replace a packed directory.
    """
    started = time.perf_counter()
    result = write.pack(
        model,
        out,
        storage=storage,
        head=head,
        dtype=dtype,
        tokenizer=tokenizer,
        check=check,
        overwrite=overwrite,
    )
    say(f"packed in {time.perf_counter() - started:.1f} s")
    return result


def inspect(model: Path, *, as_json: AsJson = False) -> dict[str, Any] | str:
    """What a packed, trained or ordinary directory holds, measured: patterns, zeros, bits, sizes.

    Args:
        model: its directory, or a GGUF file.
        as_json: print JSON instead of a table.
    """
    report = inspecting.inspect(model)
    if as_json:
        return report.as_dict()
    console.print(report.table())
    return f"\n{report.summary()}"


def evaluate(
    model: Path,
    baseline: tyro.conf.Positional[Path | None] = None,
    *,
    measurements: tyro.conf.OmitArgPrefixes[Measurements] = DEFAULT_MEASUREMENTS,
    dtype: DType | None = None,
    device: str | None = None,
    as_json: AsJson = False,
) -> Report | Comparison | dict[str, Any]:
    """Perplexity, cloze accuracy and lm-eval tasks of a model: packed, trained or ordinary.

    Args:
        model: its directory, or a GGUF file.
        baseline: another model's, measured likewise and compared with.
        measurements: what to measure, and how.
        dtype: to compute in; the stored one when left out.
        device: the GPU when left out, if there is one.
        as_json: print JSON instead of lines.
    """
    reports = {}
    if baseline is not None and measurements.window is None:
        # One for both, or the difference would be of unlike contexts. What cannot be read is told
        # when it is loaded.
        with suppress(OSError, ValueError):
            window = min(default_window(read_shape(one)) for one in (model, baseline))
            measurements = replace(measurements, window=window)
            say(
                f"windows of {window:,} tokens for both; --window takes the length that they were "
                "trained with"
            )
    for one in (model, *([] if baseline is None else [baseline])):
        loaded = load_with_tokenizer(one, dtype=dtype, device=device)
        reports[str(one)] = measure(*loaded, measurements)
        del loaded  # one at a time in memory
    found = Comparison(reports) if len(reports) == 2 else reports[str(model)]
    return found.as_dict() if as_json else found
