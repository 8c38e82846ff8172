"""The verbs ``export`` and ``import``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from sparse_bitnet.core import ConfigError
from sparse_bitnet.export.bitnet.read import ImportResult, import_bitnet
from sparse_bitnet.export.bitnet.write import LinearClass, export_bitnet
from sparse_bitnet.export.exportable import ExportResult
from sparse_bitnet.export.gguf.read import import_gguf
from sparse_bitnet.export.gguf.write import EmbeddingType, LinearType, OddRows, export_gguf

Target = Literal["gguf", "bitnet"]


def export(
    model: Path,
    out: Path,
    *,
    to: Target | None = None,
    linears: LinearType | None = None,
    embeddings: EmbeddingType | None = None,
    odd_rows: OddRows | None = None,
    linear_class: LinearClass | None = None,
    overwrite: bool = False,
) -> ExportResult:
    """Write a packed or trained model in a format of others; prints what that format loses.

    Args:
        model: its directory, packed or trained.
        out: the file (gguf) or directory (bitnet) to write.
        to: gguf for llama.cpp, bitnet for stock transformers; by default gguf if OUT ends so.
        linears: gguf: tq2_0 (2.06 bits a weight), tq1_0 (1.69) or, for newer builds, q2_0 (2.25).
        embeddings: gguf: type of embedding and head; f16 when left out.
        odd_rows: gguf: rows that the block (256; 64 of q2_0) does not divide: refused, or F16.
        linear_class: bitnet: bitlinear (the default), or autobitlinear.
        overwrite: replace a GGUF file, or a directory in bitnet's format.
    """
    if to is None:
        if out.suffix.lower() != ".gguf":
            raise ConfigError("export: name the format with --to gguf or --to bitnet")
        to = "gguf"
    options: dict[str, dict[str, Any]] = {
        "gguf": {"linears": linears, "embeddings": embeddings, "odd_rows": odd_rows},
        "bitnet": {"linear_class": linear_class},
    }
    given = {n: {k: v for k, v in one.items() if v is not None} for n, one in options.items()}
    if other := given["bitnet" if to == "gguf" else "gguf"]:
        raise ConfigError(f"export: --{min(other).replace('_', '-')} is no option of --to {to}")
    write = export_gguf if to == "gguf" else export_bitnet
    return write(model, out, overwrite=overwrite, **given[to])


def import_checkpoint(
    source: Path, out: Path, *, pattern: str = "dense", overwrite: bool = False
) -> ImportResult | str:
    """Read a checkpoint of transformers' bitnet format as a trained model, or a GGUF file as a
    float32 one to start from.

    Args:
        source: directory of the checkpoint, with safetensors; or a GGUF file (without a pattern).
        out: directory of the model to write.
        pattern: N:M to mask to in one shot; dense leaves the weights as they are.
        overwrite: replace a model of the kind that is written.
    """
    if not source.exists():
        raise ConfigError(f"import: {source}: there is no such directory or file")
    if source.is_file():
        if pattern != "dense":
            raise ConfigError("import: a GGUF file is written as it is, without a pattern")
        return import_gguf(source, out, overwrite=overwrite)
    return import_bitnet(source, out, pattern=pattern, overwrite=overwrite)
