"""Import of GGUF files as ordinary Hugging Face directories, dequantized by transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sparse_bitnet.core import CheckpointError, ConfigError, check_finite
from sparse_bitnet.export.gguf.write import gguf_package
from sparse_bitnet.files import atomic_directory
from sparse_bitnet.train.dense import LOCAL, MOST_LAYERS, no_bars


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

    Args:
        source: the file; of an architecture and a tokenizer that transformers reads from GGUF.
        out: the directory to write, new or empty; it appears whole or not at all.

    Raises:
        MissingExtraError: without the package ``gguf``.
        ConfigError: if there is no such file, or ``out`` holds something.
        CheckpointError: if transformers cannot read the file, or a value is NaN or infinite.
    """
    source, out = Path(source), Path(out)
    gguf_package("reading")
    if not source.is_file():
        raise ConfigError(f"{source}: there is no such file")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out} exists; give a new directory, or remove it first")
    place: dict[str, Any] = {"gguf_file": source.name, **LOCAL}
    try:
        with no_bars():
            # Checked here because transformers would first build that many layers.
            layers = AutoConfig.from_pretrained(source.parent, **place).num_hidden_layers
            if not 0 <= layers <= MOST_LAYERS:
                raise ValueError(f"it describes {layers} layers")
            read = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **place)
            tokenizer = AutoTokenizer.from_pretrained(source.parent, **place)
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
