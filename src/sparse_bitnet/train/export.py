"""Save a trained model as a Hugging Face directory, and load it.

The weight files hold the float32 master weights under their own names, and ``config.json`` says
how the linears computed (:mod:`sparse_bitnet.nn.record`). ``sparse_bitnet.json`` says it too, with
facts about the run and checksums of the weight files. Packing (ternary weights, a small file) is
another package: ``packed``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparse_bitnet.core import CheckpointError, ConfigError, DataError, PatternError
from sparse_bitnet.data.tokenizer import has_tokenizer, load_tokenizer
from sparse_bitnet.files import atomic_directory, read_json, write_text
from sparse_bitnet.nn.convert import convert_recorded
from sparse_bitnet.nn.record import (
    ABSENT,
    SIDE_FILE,
    is_record,
    modules_here,
    refuse_files_of_others,
)
from sparse_bitnet.train.checksums import checksums, weight_files
from sparse_bitnet.train.config import SparsityConfig
from sparse_bitnet.train.dense import IMPORT_FIRST, check_has_model, is_gguf, no_bars, read_dense
from sparse_bitnet.train.model import convert_model
from sparse_bitnet.train.parallel import Ranks
from sparse_bitnet.train.recipe import checked

FORMAT = 1


def save_trained(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    directory: str | Path,
    sparsity: SparsityConfig,
    run: dict[str, Any] | None = None,
    ranks: Ranks | None = None,
    check: Callable[[], None] | None = None,
) -> Path:
    """Write a converted model's master weights, its tokenizer and ``sparse_bitnet.json``.

    Args:
        model: converted, sharded or not. Under FSDP2 every rank must call; rank 0 writes.
        sparsity: as the model was converted.
        run: facts worth keeping with the weights (steps, losses); any JSON.
        ranks: who takes part; one process when left out.
        check: refuses what stands in the directory; what is no trained model when left out.

    Returns:
        The directory. It appears whole or not at all; a trained one that is there already is
        replaced.

    Raises:
        ConfigError: if something else is there already.
        OutputError: if it cannot be written.
    """
    directory = Path(directory)
    check = check or partial(check_trained_output, directory)
    check()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gather = ranks is not None and ranks.is_distributed
    weights = get_model_state_dict(model, options=options) if gather else None
    if ranks is None or ranks.is_main:
        with atomic_directory(directory, check) as temporary:
            with no_bars():
                model.save_pretrained(temporary, state_dict=weights)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
            kept = {"pattern", "kind", "method", "rules"}
            described = dataclasses.asdict(sparsity)
            described = {key: value for key, value in described.items() if key in kept}
            sums = checksums(temporary, sorted(weight_files(temporary)))
            values = {"format": FORMAT, **described, "run": run or {}, "files": sums}
            values["recorded"] = True  # in config.json, since version 0.2
            write_text(temporary / SIDE_FILE, json.dumps(values, indent=1))
    if ranks is not None:
        ranks.wait()
    return directory


def check_trained_output(directory: Path) -> None:
    """Refuse to replace what is no trained model, or files that are not of one.

    Raises:
        ConfigError: naming the directory.
    """
    if not directory.exists():
        return
    if (directory / SIDE_FILE).is_file():
        return refuse_files_of_others(directory)
    if not directory.is_dir() or any(directory.iterdir()):
        raise ConfigError(
            f"{directory} exists and is not a trained model; give a new directory, or remove it "
            "first"
        )


def is_trained(directory: str | Path) -> bool:
    """Whether a directory holds a converted model's master weights, written by :func:`save_trained`
    or by ``save_pretrained``."""
    return (Path(directory) / SIDE_FILE).is_file() or _recorded(Path(directory)) is not None


def _recorded(directory: Path) -> Any:
    """What ``convert`` wrote into the configuration, or None; also of a damaged one, which whoever
    loads the model will name."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        config = read_json(directory / "config.json")
        if config.get("transformers_weights") == ABSENT and is_record(
            config.get("quantization_config")
        ):
            return config["quantization_config"]
    return None


def read_trained(directory: str | Path) -> SparsityConfig:
    """The linears' sparsity, from ``sparse_bitnet.json``, or without one from ``config.json``.

    Raises:
        CheckpointError: if there is none or it is not one of ours.
    """
    directory = Path(directory)
    path = directory / SIDE_FILE
    try:
        if not path.is_file() and (recorded := _recorded(directory)) is not None:
            path = directory / "config.json"
            values = {**recorded, "format": FORMAT}
        else:
            values = read_json(path)
            if values.get("recorded") and _recorded(directory) is None:
                raise CheckpointError(
                    f"{path} is of a converted model, config.json of a dense one that was saved "
                    f"over it; remove {SIDE_FILE} if that is the one you want"
                )
        if values["format"] != FORMAT:
            raise CheckpointError(
                f"{path} has format {values['format']!r}; this version reads format {FORMAT}"
            )
        described = {name: values[name] for name in ("pattern", "kind", "method", "rules")}
        return checked(SparsityConfig, described, path.name)
    except FileNotFoundError as error:
        check_has_model(directory)
        raise CheckpointError(
            f"{directory} is not a trained model: it has no {SIDE_FILE}, and its config.json does "
            "not say that it was converted"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged or foreign: {error}") from error


def load_trained(
    directory: str | Path, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Read a directory of :func:`save_trained`, or of ``save_pretrained`` of a converted model, and
    convert the model as it was.

    Returns:
        The converted model in evaluation mode, float32 master weights, on ``device``; and the
        tokenizer, or None if the directory has none.

    Raises:
        CheckpointError: if the directory is missing, damaged or not a trained model.
    """
    directory = Path(directory)
    if is_gguf(directory):
        raise CheckpointError(f"{directory} {IMPORT_FIRST}, and train that")
    sparsity = read_trained(directory)
    model = read_dense(directory, exact=True, use_safetensors=True)
    tokenizer = own_tokenizer(directory)
    model = model.to(device)  # type: ignore[arg-type]  # wrapped nn.Module.to
    recorded = _recorded(directory)
    if recorded is None:  # of version 0.1
        convert_model(model, sparsity)
        return model, tokenizer
    how = sparsity.pattern, sparsity.kind, sparsity.method, sparsity.rules
    try:
        convert_recorded(model, modules_here(model, recorded["modules"]), *how)
    except (KeyError, TypeError, AttributeError, ConfigError, PatternError) as error:
        raise CheckpointError(f"{directory}/config.json is damaged or foreign: {error}") from error
    return model, tokenizer


def own_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model's directory; None if it has none.

    Raises:
        CheckpointError: if it is damaged.
    """
    if not has_tokenizer(directory):
        return None
    try:
        return load_tokenizer(directory)
    except DataError as error:
        raise CheckpointError(f"{directory} cannot be loaded: {error}") from error
