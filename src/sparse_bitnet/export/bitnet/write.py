"""Export to transformers' ``bitnet`` format, which needs no package of ours to read.

Both of its layers multiply int8 activations (by token, as here) with ternary weights and one scale:

    linear_class     weight_scale    output
    bitlinear        1/γ             x̂Tᵀ / weight_scale + bias
    autobitlinear    γ               (x̂Tᵀ + bias) · weight_scale, so a bias is stored as bias/γ

N:M is kept, as zeros, but not named; there is one γ a layer and no other width of activations.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

from torch import Tensor, nn
from transformers import BitNetQuantConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from sparse_bitnet.console import progress
from sparse_bitnet.core import ConfigError
from sparse_bitnet.export.exportable import Exportable, ExportResult, open_exportable
from sparse_bitnet.files import atomic_directory
from sparse_bitnet.formats import row_quarters
from sparse_bitnet.formats.two_bit import PER_BYTE
from sparse_bitnet.packed.tensor_file import write_tensors
from sparse_bitnet.packed.verify import WEIGHTS, check_output, is_stored_as

LinearClass = Literal["bitlinear", "autobitlinear"]


def export_bitnet(
    directory: str | Path,
    out: str | Path,
    *,
    linear_class: LinearClass = "bitlinear",
    overwrite: bool = False,
) -> ExportResult:
    """Write a packed or trained model as a ``bitnet`` directory of transformers.

    Args:
        directory: of the model.
        out: the directory to write, new or empty; it appears whole or not at all.
        linear_class: which of the two layers computes it; llama.cpp's converter reads the first.
        overwrite: replace a directory of this format, if it has no files of somebody else.

    Raises:
        PackedFormatError, CheckpointError: if the directory is damaged or none of ours.
        ConfigError: if the format cannot say the model, or ``out`` is there and not to be replaced.
        WeightError: if a tensor holds NaN or infinity.
    """
    out = Path(out)
    is_bitnet = partial(is_stored_as, method="bitnet")
    check_place = partial(check_output, out, "a model of the bitnet format", is_bitnet, overwrite)
    check_place()
    source = open_exportable(directory, "the bitnet format")
    for name, (rows, _) in source.shapes.items():
        if rows % PER_BYTE:
            raise ConfigError(
                f"{name}: the bitnet format stores four rows in a byte, and there are {rows}; "
                "leave the layer out with a rule in training, or run the model with sparse-bitnet"
            )
    with atomic_directory(out, check_place) as temporary:
        _write_config(source, temporary, linear_class)
        if source.tokenizer is not None:
            source.tokenizer.save_pretrained(temporary)
        write_tensors(temporary / WEIGHTS, dict(_tensors(source, linear_class)))
    size = sum(file.stat().st_size for file in out.iterdir())
    lost = [
        "the pattern is kept as zeros and no longer named",
        "transformers unpacks every weight to the model's dtype whenever it is used",
        "in bfloat16 or float16 it also rounds the scales and sums; load with dtype=torch.float32 "
        "to get the logits of training (every layer's to 1e-6 of its size; an activation that this "
        "rounds the other way is carried on, far in a deep model that was never trained ternary)",
    ]
    return ExportResult(out, f"bitnet ({linear_class})", source.weights, size, lost)


def _tensors(source: Exportable, linear_class: LinearClass) -> Iterator[tuple[str, Tensor]]:
    biases = {f"{name}.bias" for name in source.shapes}
    yield from ((n, tensor) for n, tensor in source.others.items() if n not in biases)
    with progress("writing bitnet", len(source.shapes)) as task:
        for name in source.shapes:
            ternary, rows = source.linear(name)
            scale = rows[:1]
            if not bool((rows == scale).all()):
                raise ConfigError(
                    f"{name}: the bitnet format has one scale a layer, and this one fuses matrices "
                    "with their own; run the model with sparse-bitnet"
                )
            inverse = linear_class == "bitlinear"
            yield f"{name}.weight", row_quarters.pack(ternary, name)
            yield f"{name}.weight_scale", 1 / scale if inverse else scale
            bias = source.others.get(f"{name}.bias")
            if bias is not None:
                yield f"{name}.bias", bias.float() if inverse else bias.float() / scale
            task.advance()


def _write_config(source: Exportable, directory: Path, linear_class: LinearClass) -> None:
    model = source.model
    head = model.get_output_embeddings()
    kept = [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) and name not in source.shapes) or module is head
    ]
    for name in source.shapes:
        if not should_convert_module(name, kept):
            raise ConfigError(
                f"{name}: the bitnet format names the layers that it leaves alone, and "
                f"{', '.join(kept)} would leave out this one too"
            )
    config = copy.deepcopy(model.config)
    config.quantization_config = BitNetQuantConfig(kept, linear_class, "offline")
    if hasattr(config, "auto_map"):
        del config.auto_map
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    config.save_pretrained(directory)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(directory)
