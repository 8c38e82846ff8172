"""Import of transformers' ``bitnet`` checkpoints as trained directories."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from sparse_bitnet.core import ConfigError
from sparse_bitnet.data.tokenizer import load_tokenizer
from sparse_bitnet.export.bitnet.checkpoint import BitNetCheckpoint
from sparse_bitnet.nn import convert
from sparse_bitnet.packed.verify import read_json, refuse_foreign
from sparse_bitnet.train import SparsityConfig, save_trained
from sparse_bitnet.train.export import check_target


@dataclass(frozen=True)
class ImportResult:
    """What :func:`import_bitnet` wrote. ``str()`` says it in lines.

    Attributes:
        directory: a trained directory: evaluate, pack, export it, or train on from it.
        architecture: the model's class.
        format: linear class and quantization mode of the checkpoint.
        modules, weights: how many are ternary.
        pattern: that they keep now.
    """

    directory: Path
    architecture: str
    format: str
    modules: int
    weights: int
    pattern: str

    def __str__(self) -> str:
        return (
            f"{self.directory}: {self.architecture} from {self.format}, {self.modules} layers with "
            f"{self.weights:,} ternary weights, pattern {self.pattern}"
        )


def import_bitnet(source: str | Path, out: str | Path, *, pattern: str = "dense") -> ImportResult:
    """Read a checkpoint of ``quant_method: bitnet`` and write it as a trained directory.

    Args:
        source: directory of the checkpoint; its weights have to be safetensors.
        out: the trained directory to write; it appears whole or not at all. A trained directory
            that is there already is replaced, unless it holds files of somebody else.
        pattern: N:M to mask to in one shot; dense leaves the weights as they are. γ stays that of
            the dense weight. Where magnitudes are equal, as in weights that were stored ternary,
            zeros go first and then those further right.

    Raises:
        PackedFormatError: if the checkpoint is damaged, or its parts contradict each other.
        ConfigError: if it is of another format, uses a part of it that is not known here, or
            ``out`` is another kind of directory.
        PatternError: if M does not divide a layer's input features.
        WeightError: if a weight is NaN or infinite.
    """
    source, out = Path(source), Path(out)
    check_target(out)
    refuse_foreign(out)
    checkpoint = BitNetCheckpoint(source)
    model = checkpoint.load()
    tokenizer = _load_tokenizer(source)
    conversion = convert(model, pattern, rules=checkpoint.rules)
    lost = sorted(checkpoint.ternary & conversion.skipped.keys())
    if lost:
        raise ConfigError(
            f"{source}: {lost[0]} is ternary there and cannot be here, because "
            f"{conversion.skipped[lost[0]]}; this checkpoint cannot be imported"
        )
    sparsity = SparsityConfig(pattern=pattern, rules=checkpoint.rules)
    save_trained(model, tokenizer, out, sparsity, run={"imported": checkpoint.format})
    return ImportResult(
        out,
        type(model).__name__,
        checkpoint.format,
        conversion.modules,
        conversion.weights,
        pattern,
    )


def _load_tokenizer(directory: Path) -> PreTrainedTokenizerBase | None:
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return None
    if "auto_map" in read_json(path):
        raise ConfigError(f"{path}: this tokenizer is code, which is not run; remove its files")
    return load_tokenizer(directory)
