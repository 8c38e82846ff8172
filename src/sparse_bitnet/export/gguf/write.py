"""Writer of GGUF files that stock llama.cpp loads.

llama.cpp has three formats that hold ternary weights, in blocks of a row with one fp16 scale: TQ2_0
(256 weights in 66 bytes, 2.06 bits a weight), TQ1_0 (256 in 54, 1.69 bits) and, in newer builds and
on GPUs too, Q2_0 (64 in 18, 2.25 bits). Stored are the
weights as they compute here, masked and ternary: the digits are exact, and γ is rounded to fp16,
the same for all blocks of a matrix, so that what changes is its size by at most 2⁻¹¹ and no weight
against another. llama.cpp also knows a float32 ``.scale`` tensor beside a weight, which would keep
γ whole; but its qwen2 graph reads those of the feed-forward layers and does not apply them.

Rows that the block does not divide have no ternary form there; they are refused, or stored as F16,
which also leaves their activations unquantized.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sparse_bitnet.console import progress
from sparse_bitnet.core import ConfigError, WeightError
from sparse_bitnet.export.exportable import Exportable, ExportResult, open_exportable
from sparse_bitnet.export.gguf.model import (
    ROPE_FREQS,
    architecture,
    check_bias,
    reorder_rows,
    rope_factors,
    write_hyperparameters,
)
from sparse_bitnet.files import atomic_file
from sparse_bitnet.packed.verify import check_output
from sparse_bitnet.train.dense import begins_as_gguf, gguf_package

LinearType = Literal["tq2_0", "tq1_0", "q2_0"]
EmbeddingType = Literal["f16", "q8_0", "f32"]
OddRows = Literal["refuse", "f16"]
BLOCKS = {"TQ2_0": 256, "TQ1_0": 256, "Q2_0": 64}
ROUNDED_TOGETHER = {"TQ2_0": 256, "TQ1_0": 256, "Q2_0": 32}  # activations
# transformers' names → those that the package gguf knows
SUB_NORMS = {"attn_sub_norm": "inner_attn_ln", "ffn_sub_norm": "ffn_layernorm"}
Q2_0, Q2_0_BYTES, MOSTLY_Q2_0 = 42, 18, 41  # in ggml; the package gguf 0.19 does not know them
LARGEST_F16 = 65504.0


@dataclass(frozen=True)
class _Planned:
    """A tensor of the file: its shape ``[..., row]``, its type there, and how to get its values."""

    name: str
    shape: tuple[int, ...]
    kind: str
    read: Callable[[], Tensor]


def export_gguf(
    directory: str | Path,
    out: str | Path,
    *,
    linears: LinearType = "tq2_0",
    embeddings: EmbeddingType = "f16",
    odd_rows: OddRows = "refuse",
    overwrite: bool = False,
) -> ExportResult:
    """Write a packed or trained model as a GGUF file. Needs the extra ``gguf``.

    Args:
        directory: of the model and its tokenizer.
        out: the file, new; it appears whole or not at all.
        linears: how ternary layers are stored.
        embeddings: how embedding and output head are stored.
        odd_rows: what to do with ternary layers whose rows the block of ``linears`` (256; 64 of
            q2_0) does not divide.
        overwrite: replace a GGUF file.

    Raises:
        MissingExtraError: without the package ``gguf``.
        PackedFormatError, CheckpointError: if the directory is damaged or none of ours.
        ConfigError: if llama.cpp has no name for the architecture or the tokenizer, no block fits
            a row, or ``out`` is there and not to be replaced.
        WeightError: if a value does not fit fp16.
    """
    gguf_package()
    from sparse_bitnet.export.gguf.tokenizer import vocabulary

    out = Path(out)
    if out.is_dir():
        raise ConfigError(f"{out} is a directory; name the file to write, such as model.gguf")

    def is_such(path: Path) -> bool:
        return path.is_file() and begins_as_gguf(path)

    check_place = partial(check_output, out, "a GGUF file", is_such, overwrite)
    check_place()
    source = open_exportable(directory, "GGUF")
    kind = architecture(source.model)
    if source.tokenizer is None:
        raise ConfigError(
            f"gguf: {directory} has no tokenizer, and llama.cpp reads it from the same file; copy "
            "its files there, or pack the model again with one"
        )
    lost = ["N:M is kept as zeros, of which llama.cpp makes no use"]
    embedding: Any = source.model.get_input_embeddings()
    words, otherwise = vocabulary(source.tokenizer, len(embedding.weight))
    # Generation may stop at more tokens than the one that ends a document.
    ends = getattr(source.model.generation_config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    if others := [end for end in ends if end not in (None, words["eos_token_id"])]:
        words["eot_token_id"] = others[0]
    tensors = _Tensors(source, kind, linears.upper(), embeddings.upper(), odd_rows)
    lost.append(f"embedding and head are stored as {embeddings.upper()}")
    odd, layers = len(tensors.odd), len(source.shapes)
    if odd:
        lost.append(
            f"{odd} of {layers} ternary layers have rows that {BLOCKS[linears.upper()]} does not "
            "divide and are stored as F16; llama.cpp does not quantize their activations"
        )
    if odd < layers:
        together = ROUNDED_TOGETHER[tensors.main]
        lost.append(
            f"activations are rounded to 8 bits by blocks of {together} there, by token here"
        )
    with atomic_file(out, check_place) as temporary:
        _write(temporary, kind, source, words, tensors, lost, Path(directory).resolve().name)
    change = tensors.largest_change
    lost.insert(0, f"each γ is rounded to fp16, which changes it by at most {change:.1e} of itself")
    return ExportResult(
        out,
        f"GGUF {tensors.main}",
        source.weights,
        out.stat().st_size,
        lost + otherwise,
        {planned.name: planned.kind for planned in tensors.planned},
    )


class _Tensors:
    """Tensors of the file: planned from shapes alone, read one after the other."""

    def __init__(
        self, source: Exportable, kind: str, linears: str, embeddings: str, odd_rows: OddRows
    ) -> None:
        gguf = gguf_package()
        self.source, self.largest_change = source, 0.0
        blocks = source.model.config.num_hidden_layers
        wanted = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
        self._names = gguf.get_tensor_name_map(wanted, blocks)
        block = BLOCKS[linears]
        self.odd = [name for name, (_, columns) in source.shapes.items() if columns % block]
        self.main = "F16" if len(self.odd) == len(source.shapes) else linears
        odd = self.odd
        if odd and odd_rows == "refuse":
            newer = "; --linears q2_0, which newer llama.cpp reads, has blocks of 64"
            if any(source.shapes[name][1] % BLOCKS["Q2_0"] for name in odd):
                newer = ""
            raise ConfigError(
                f"gguf: {linears} stores rows in blocks of {block}, and the rows of {odd[0]} have "
                f"{source.shapes[odd[0]][1]} weights ({len(odd)} of {len(source.shapes)} layers "
                f"are such). With --odd-rows f16 these layers are stored as F16{newer}"
            )
        self.planned = list(self._dense(embeddings))
        for name, shape in source.shapes.items():
            kind = "F16" if name in odd else linears
            there = self._name(f"{name}.weight")
            self.planned.append(_Planned(there, shape, kind, partial(self._weight, name)))

    def _dense(self, embeddings: str) -> Iterator[_Planned]:
        heads = {"token_embd.weight", "output.weight"}
        for name, tensor in self.source.others.items():
            there = self._name(name)
            if name.endswith(".bias"):
                check_bias(self.source.model, name.removesuffix(".bias"))
            kind = embeddings if there in heads else "F32" if tensor.dim() < 2 else "F16"
            if kind == "Q8_0" and tensor.shape[-1] % 32:
                raise ConfigError(
                    f"gguf: Q8_0 stores rows in blocks of 32, and those of {name} have "
                    f"{tensor.shape[-1]} values; use --embeddings f16"
                )
            yield _Planned(there, tuple(tensor.shape), kind, partial(self._reordered, name))
        factors = rope_factors(self.source.model)
        if factors is not None:
            yield _Planned(ROPE_FREQS, tuple(factors.shape), "F32", lambda: factors)

    def _name(self, name: str) -> str:
        known = re.sub(r"attn_sub_norm|ffn_sub_norm", lambda m: SUB_NORMS[m[0]], name)
        there = self._names.get_name(known, try_suffixes=(".weight", ".bias"))
        if there is None:
            raise ConfigError(f"gguf: llama.cpp has no name for the tensor {name}")
        return str(there)

    def _reordered(self, name: str, tensor: Tensor | None = None) -> Tensor:
        tensor = self.source.others[name] if tensor is None else tensor
        order = reorder_rows(self.source.model, name.rpartition(".")[0])
        return tensor if order is None else tensor[order]

    def _weight(self, name: str) -> Tensor:
        """float32 ``[out, in]``: the ternary weight times its γ in fp16."""
        ternary, exact = self.source.linear(name)
        _check_f16(exact, f"{name}: γ")
        scale = exact.half().float()
        self.largest_change = max(self.largest_change, float((scale / exact - 1).abs().max()))
        return self._reordered(f"{name}.weight", ternary * scale.unsqueeze(-1))


def _write(
    path: Path,
    kind: str,
    source: Exportable,
    words: dict[str, Any],
    tensors: _Tensors,
    lost: list[str],
    name: str,
) -> None:
    gguf = gguf_package()
    writer = gguf.GGUFWriter(path, kind)
    writer.add_type("model")
    writer.add_name(name)
    main = tensors.main
    writer.add_file_type(MOSTLY_Q2_0 if main == "Q2_0" else gguf.LlamaFileType[f"MOSTLY_{main}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    write_hyperparameters(writer, source.model, lost)
    for key, value in words.items():
        getattr(writer, f"add_{key}")(value)
    for planned in tensors.planned:
        if planned.kind == "Q2_0":
            quantized, size = Q2_0, math.prod(planned.shape) // BLOCKS["Q2_0"] * Q2_0_BYTES
        else:
            quantized = gguf.GGMLQuantizationType[planned.kind]
            size = math.prod(gguf.quant_shape_to_byte_shape(planned.shape, quantized))
        writer.add_tensor_info(planned.name, planned.shape, np.float32, size, quantized)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with progress(f"writing {tensors.main}", len(tensors.planned)) as task:
            for planned in tensors.planned:
                writer.write_tensor_data(_encoded(planned))
                task.advance()
    finally:
        writer.close()


def _encoded(planned: _Planned) -> NDArray[Any]:
    gguf = gguf_package()
    values = planned.read().detach().float()
    if planned.kind in ("F16", "Q8_0"):
        _check_f16(values, planned.name)
    plain = np.ascontiguousarray(values.numpy())
    if planned.kind == "Q2_0":
        return encode_q2_0(plain)
    kind = gguf.GGMLQuantizationType[planned.kind]
    encoded: NDArray[Any] = gguf.quants.quantize(plain, kind)
    return encoded


def encode_q2_0(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Blocks of 64 ternary values: one fp16 scale, then the codes value + 1, four a byte, the first
    in the lowest bits.

    Args:
        values: ``[out, in]``, each ±one fp16 number or 0 within a block.
    """
    blocks = values.reshape(-1, BLOCKS["Q2_0"])
    scale = np.abs(blocks).max(-1, keepdims=True).astype("<f2")
    codes = (np.sign(blocks) + 1).astype(np.uint8).reshape(len(blocks), -1, 4)
    packed = (codes << np.array([0, 2, 4, 6], np.uint8)).sum(-1, dtype=np.uint8)
    return np.concatenate([scale.view(np.uint8), packed], axis=-1)


def _check_f16(values: Tensor, where: str) -> None:
    if values.numel() and float(values.abs().max()) > LARGEST_F16:
        raise WeightError(
            f"{where}: {float(values.abs().max()):.3g} does not fit fp16, which ends at "
            f"{LARGEST_F16:.0f}; the model cannot be stored in this format"
        )
