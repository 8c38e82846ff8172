"""Load packed, trained and ordinary directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sparse_bitnet.console import say
from sparse_bitnet.core import ConfigError, PackedFormatError
from sparse_bitnet.data.tokenizer import has_tokenizer, load_tokenizer
from sparse_bitnet.files import refuse_special
from sparse_bitnet.kernels.native.pages import use_large_pages
from sparse_bitnet.kernels.platform import compile_options, usable_device
from sparse_bitnet.modeling import build_decoder, unsupported
from sparse_bitnet.nn import master_weights
from sparse_bitnet.nn.int8_head import Int8Table
from sparse_bitnet.nn.packed_module import prepare
from sparse_bitnet.packed.config import QUANT_METHOD, SparseBitNetConfig
from sparse_bitnet.packed.quantizer import SparseBitNetQuantizer
from sparse_bitnet.packed.tensor_file import read_tensors
from sparse_bitnet.packed.verify import CONFIG, quant_method, read_json, weight_files
from sparse_bitnet.train.dense import (
    LOCAL,
    foreign_code,
    is_gguf,
    no_bars,
    read_dense,
    read_gguf,
    read_shape,
)
from sparse_bitnet.train.export import is_trained, load_trained, own_tokenizer

DType = Literal["float32", "bfloat16", "float16"]


def is_packed(directory: str | Path) -> bool:
    """Does the directory's ``config.json`` say that it is one of ours?

    Raises:
        PackedFormatError: if there is a ``config.json`` and it is damaged.
    """
    return quant_method(Path(directory)) == QUANT_METHOD


def read_config(directory: Path) -> tuple[dict[str, Any], SparseBitNetConfig]:
    """A packed directory's ``config.json``, and what its quantization says.

    Raises:
        PackedFormatError: if it is missing, damaged, newer than this package, or foreign.
    """
    if not is_packed(directory):
        raise PackedFormatError(
            f"{directory}: there is no config.json of a packed Sparse-BitNet model; make one with: "
            "sparse-bitnet pack"
        )
    config = read_json(directory / CONFIG)
    return config, SparseBitNetConfig(**config["quantization_config"])


def load_packed(directory: str | Path, **options: Any) -> PreTrainedModel:
    """Load a packed directory, with an error of ours for everything that is wrong with it.

    ``AutoModelForCausalLM.from_pretrained(directory)`` does the same once this package is imported,
    but a damaged ``config.json`` or index is then reported by transformers, in its own words.

    Args:
        directory: a packed directory.
        options: for ``from_pretrained``, such as ``dtype`` or ``device_map``.

    Raises:
        PackedFormatError: naming the file, what is wrong with it and what to do.
    """
    directory = Path(directory)
    config, _ = read_config(directory)
    try:
        refuse_special(*directory.iterdir())
    except ValueError as error:
        raise PackedFormatError(f"{error}; get the directory again") from None
    if (defaults := directory / "generation_config.json").exists():
        read_json(defaults)  # transformers goes on without a damaged one
    tensors = sum(len(read_tensors(path).tensors) for path in weight_files(directory))
    layers = config.get("num_hidden_layers", 0)
    if type(layers) is not int or not 0 <= layers <= tensors:
        # Checked here because transformers would first build that many layers.
        raise PackedFormatError(
            f"{directory / CONFIG}: num_hidden_layers is {str(layers)[:40]}, but there are "
            f"{tensors} tensors in the weight files; the file was edited or damaged, get it again"
        )
    code = foreign_code(config)
    if code:
        raise PackedFormatError(f"{directory / CONFIG}: {code}; the file was edited, get it again")
    try:
        with no_bars():
            model = AutoModelForCausalLM.from_pretrained(directory, **LOCAL | options)
    except PackedFormatError:
        raise
    except Exception as error:  # whatever a damaged config.json makes transformers and torch raise
        raise PackedFormatError(
            f"{directory}: transformers cannot build this model: {str(error)[:500]}; its "
            "config.json was edited or damaged, or is for another version of transformers (it was "
            f"written with {str(config.get('transformers_version'))[:20]})"
        ) from error
    if not isinstance(getattr(model, "hf_quantizer", None), SparseBitNetQuantizer):
        raise PackedFormatError(f"{directory}: transformers did not recognise the packed weights")
    return model


def load(
    directory: str | Path,
    *,
    dtype: DType | None = None,
    device: str | torch.device | None = None,
    compile: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a model directory to run it, and its tokenizer if it has one: a packed one, a trained
    one, or an ordinary one of Hugging Face (or a GGUF file), which computes as transformers does.

    A packed model of the Llama family becomes
    :class:`sparse_bitnet.modeling.DecoderForCausalLM`; others stay in transformers' own classes, as
    ``AutoModelForCausalLM.from_pretrained`` gives all of them.

    Args:
        directory: as written by packing, by training, or by ``save_pretrained``; or a GGUF file.
        dtype: to compute in; the stored one when left out.
        device: where to put the model; the GPU when left out, if there is one.
        compile: on a GPU, let ``generate`` decode with a static key-value cache, compiled. A token
            is one CUDA graph either way; compiled it has fewer kernels. Compiling takes its time
            before the second token: it pays for long texts.

    Raises:
        PackedFormatError: if a packed directory is damaged, or its weights break their pattern.
        CheckpointError: if another one is damaged, or there is no model.
        ConfigError: if PyTorch cannot compute on that device here; for ``compile`` without an
            NVIDIA GPU.
    """
    device = usable_device(device)
    if compile and device.type != "cuda":
        raise ConfigError(
            f"--compile needs the model on an NVIDIA GPU, it is on {device.type}; leave it out"
        )
    model, tokenizer = load_unfused(directory, dtype=dtype, device=device)
    if is_packed(directory) and unsupported(model) is None:
        model = build_decoder(model)
    prepare(model)
    if device.type == "cpu":
        for module in model.modules():
            if isinstance(module, Int8Table):
                use_large_pages(module.weight)
    if compile:
        assert model.generation_config is not None
        model.generation_config.cache_implementation = "static"
        options = {"triton.cudagraphs": True, **compile_options()}
        # PyTorch takes a mode or options; these are what the mode "reduce-overhead" stands for.
        config = CompileConfig(mode=None, options=options)  # type: ignore[arg-type]
        model.generation_config.compile_config = config
    return model, tokenizer


def load_unfused(
    directory: str | Path, *, dtype: DType | None = None, device: str | torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """:func:`load` in transformers' own classes: module by module as stored, and can be saved.

    Raises:
        PackedFormatError, CheckpointError, ConfigError: as :func:`load`.
    """
    directory = Path(directory)
    device = usable_device(device)
    if not is_packed(directory):
        if is_trained(directory):
            model, tokenizer = load_trained(directory, device)
        elif is_gguf(directory):
            model, tokenizer = read_gguf(directory)
            say(f"{directory}: a {type(model).__name__}, dequantized from GGUF to float32")
            model = model.to(device)  # type: ignore[arg-type]  # wrapped nn.Module.to
        else:
            model, tokenizer = _load_ordinary(directory, device), own_tokenizer(directory)
        if dtype is not None:
            _compute_in(model, getattr(torch, dtype))
        return model, tokenizer
    model = load_packed(directory, dtype="auto" if dtype is None else getattr(torch, dtype))
    try:
        tokenizer = load_tokenizer(directory) if has_tokenizer(directory) else None
    except Exception as error:  # tokenizers raises bare Exception for a file it cannot parse
        raise PackedFormatError(
            f"{directory}: the tokenizer cannot be loaded ({str(error)[:300]}); get its files again"
        ) from error
    return model.to(device), tokenizer  # type: ignore[arg-type]  # wrapped nn.Module.to


def _load_ordinary(directory: Path, device: torch.device) -> PreTrainedModel:
    """A model that is not ours, in its own dtype; the person is told which it is."""
    model = read_dense(directory)
    dtype = getattr(read_shape(directory), "dtype", None) or torch.float32
    say(f"{directory}: an ordinary {type(model).__name__} in {str(dtype).removeprefix('torch.')}")
    _compute_in(model, dtype)
    return model.to(device)  # type: ignore[arg-type]  # wrapped nn.Module.to


def _compute_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Everything but master weights in another dtype, as a packed model would be loaded.

    Master weights stay as they are: rounded, some would become other ternary weights. So do
    buffers, such as the frequencies of the positions.
    """
    masters = {id(master.weight) for master in master_weights(model)}
    for parameter in model.parameters():
        if id(parameter) not in masters and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def load_with_tokenizer(
    directory: str | Path, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """:func:`load` with its ``options``, for uses that need the tokenizer too.

    Raises:
        ConfigError: if the directory has no tokenizer.
    """
    model, tokenizer = load(directory, **options)
    if tokenizer is None:
        raise ConfigError(
            f"{directory} has no tokenizer; copy its files there, or pack the model again with one"
        )
    return model, tokenizer
