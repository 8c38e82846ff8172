"""Import of GGUF files as ordinary Hugging Face directories, dequantized by transformers."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from sparse_bitnet.core import ConfigError
from sparse_bitnet.files import atomic_directory
from sparse_bitnet.packed.verify import check_output, is_stored_as
from sparse_bitnet.train.dense import is_gguf, no_bars, read_gguf
from sparse_bitnet.train.export import is_trained


def import_gguf(source: str | Path, out: str | Path, *, overwrite: bool = False) -> str:
    """Write the model and tokenizer of a GGUF file as float32 safetensors.

    Args:
        source: the file; of an architecture and a tokenizer that transformers reads from GGUF.
        out: the directory to write, new or empty; it appears whole or not at all.
        overwrite: replace a directory of a dense model, if it has no files of somebody else.

    Returns:
        What was written, in a line for people.

    Raises:
        MissingExtraError: without the package ``gguf``.
        ConfigError: if there is no such file, or ``out`` is there and not to be replaced.
        CheckpointError: if transformers cannot read the file, or a value is NaN or infinite.
    """
    source, out = Path(source), Path(out)
    if not is_gguf(source):
        raise ConfigError(f"{source}: there is no such GGUF file")

    def is_dense(path: Path) -> bool:
        return is_stored_as(path, None) and not is_trained(path)

    check_place = partial(check_output, out, "a dense model", is_dense, overwrite)
    check_place()
    model, tokenizer = read_gguf(source)
    with atomic_directory(out, check_place) as temporary, no_bars():
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    count = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{out}: {type(model).__name__} with {count:,} parameters in float32, not ternary; train "
        "from it with --model.source, or measure it"
    )
