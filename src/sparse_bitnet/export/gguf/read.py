"""Import of GGUF files as ordinary Hugging Face directories, dequantized by transformers."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sparse_bitnet.core import CheckpointError, ConfigError, check_finite, shown
from sparse_bitnet.export.gguf.write import gguf_package
from sparse_bitnet.files import atomic_directory
from sparse_bitnet.train.dense import LOCAL, MOST_LAYERS, no_bars

MOST_READS = 2**22  # numbers and strings in a header; a vocabulary of 200,000 with merges: 1.5 M


@dataclass(frozen=True)
class ImportedGguf:
    """What :func:`import_gguf` wrote. ``str()`` gives it in a line."""

    directory: Path
    architecture: str
    weights: int

    def __str__(self) -> str:
        return (
            f"{self.directory}: {self.architecture} with {self.weights:,} parameters in float32, "
            "not ternary; train from it with --model.source, or measure it"
        )


def import_gguf(source: str | Path, out: str | Path) -> ImportedGguf:
    """Write the model and tokenizer of a GGUF file as float32 safetensors.

    transformers does not save what it dequantized itself, so the tensors go into a fresh model.
    Of the files beside it nothing is read.

    Args:
        source: the file; of an architecture and a tokenizer that transformers reads from GGUF.
        out: the directory to write, new or empty; it appears whole or not at all.

    Raises:
        MissingExtraError: without the package ``gguf``.
        ConfigError: if there is no such file, or ``out`` holds something.
        CheckpointError: if transformers cannot read the file, a tensor of its architecture is not
            there, or a value is NaN or infinite.
    """
    source, out = Path(source), Path(out)
    gguf = gguf_package("reading")
    if not source.is_file():
        raise ConfigError(f"{source}: there is no such file")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out} exists; give a new directory, or remove it first")
    try:
        with no_bars(), tempfile.TemporaryDirectory() as alone:
            (Path(alone) / "model.gguf").symlink_to(source.resolve())
            place: dict[str, Any] = {"gguf_file": "model.gguf", **LOCAL}
            tensors = _read_header(gguf, source)
            shape = AutoConfig.from_pretrained(alone, **place)
            # transformers would make all that the header describes before it looks for a tensor.
            _check_layers(shape.num_hidden_layers, len(tensors))
            with torch.device("meta"):
                described = AutoModelForCausalLM.from_config(shape).num_parameters()
            if described > sum(tensor.n_elements for tensor in tensors):
                raise ValueError(f"it describes {described:,} weights and has not as many")
            read, info = AutoModelForCausalLM.from_pretrained(
                alone, dtype=torch.float32, output_loading_info=True, **place
            )
            if info["missing_keys"]:
                raise ValueError(f"it has no tensor for {min(info['missing_keys'])}")
            tokenizer = AutoTokenizer.from_pretrained(alone, **place)
        values = read.config.to_dict()
        values.pop("quantization_config", None)
        model = AutoModelForCausalLM.from_config(type(read.config).from_dict(values))
        model.load_state_dict(read.state_dict())
        for name, tensor in model.state_dict().items():
            check_finite(tensor, name)
    except Exception as error:  # gguf, transformers and torch each have their own
        raise CheckpointError(f"{source} cannot be read: {str(error)[:500]}") from error
    with atomic_directory(out) as temporary, no_bars():
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return ImportedGguf(out, type(model).__name__, sum(p.numel() for p in model.parameters()))


def _read_header(gguf: Any, path: Path) -> list[Any]:
    """The tensors of a file whose header fits into it.

    The package's own reader follows a count beyond the end of the file for ever.
    """

    class Bounded(gguf.GGUFReader):  # type: ignore[misc]
        reads = 0

        def _get(self, offset: int, dtype: Any, count: int = 1, *order: Any, **orders: Any) -> Any:
            self.reads += 1
            end = offset + np.dtype(dtype).itemsize * int(count)
            if end > len(self.data) or self.reads > MOST_READS:
                raise ValueError("it is cut off, or its header is longer than that of any model")
            return super()._get(offset, dtype, count, *order, **orders)

    header = Bounded(path)
    for name, field in header.fields.items():
        if name.endswith(".block_count"):
            _check_layers(field.contents(), len(header.tensors))
    return list(header.tensors)


def _check_layers(layers: Any, tensors: int) -> None:
    if type(layers) is not int or not 0 <= layers <= min(tensors, MOST_LAYERS):
        raise ValueError(f"it describes {shown(layers)} layers and has {tensors} tensors")
