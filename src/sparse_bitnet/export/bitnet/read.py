"""Import of transformers' ``bitnet`` checkpoints (see write.py) as trained directories.

The files are somebody else's, so nothing in them is believed or run: JSON and safetensors headers
are read with limits, code beside the model (``auto_map``) is ignored, pickled weights are not read,
and a model is built on the meta device, which no size in ``config.json`` makes large, and has to
take the tensors before there is memory for it.

γ and the ternary weights T are derived from master weights here. Stored T come back from

    W = T·γ/d       with d the fraction of T that is not zero,

because its mean magnitude is γ, and |W/γ| = 1/d ≥ 1 rounds and clips to one. Checkpoints of
``quantization_mode: online`` hold master weights already.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from sparse_bitnet.console import progress, say
from sparse_bitnet.core import ConfigError, PackedFormatError, WeightError, check_finite
from sparse_bitnet.core.ternary import SMALLEST_SCALE
from sparse_bitnet.data.tokenizer import load_tokenizer
from sparse_bitnet.files import refuse_special
from sparse_bitnet.formats import row_quarters
from sparse_bitnet.nn import convert
from sparse_bitnet.packed.tensor_file import read_tensors
from sparse_bitnet.packed.verify import CONFIG, check_output, read_json, weight_files
from sparse_bitnet.train import SparsityConfig, save_trained
from sparse_bitnet.train.dense import foreign_code, no_bars
from sparse_bitnet.train.export import is_trained

SCALE = "weight_scale"
LONGEST_NAME = 200
AGAIN = "the files were edited or damaged, or are of different models: get the checkpoint again"
COUNTED = re.compile(r"^(?!max_)(\w*layers|\w*depths?|(num|n)_\w*(layer|block)\w*)$", re.IGNORECASE)
NAME = re.compile(r"[\w.-]*(\*[\w.-]*){0,2}")
DERIVED_BUFFER = re.compile(r"(^|\.)rotary_emb\.inv_freq$")  # older checkpoints store it


@dataclass(frozen=True)
class ImportResult:
    """What :func:`import_bitnet` wrote. ``str()`` says it in a line."""

    directory: Path  # a trained directory: evaluate, pack, export it, or train on from it
    architecture: str  # the model's class
    format: str  # linear class and quantization mode of the checkpoint
    # how many are ternary
    modules: int
    weights: int
    pattern: str  # that they keep now

    def __str__(self) -> str:
        return (
            f"{self.directory}: {self.architecture} from {self.format}, {self.modules} layers with "
            f"{self.weights:,} ternary weights, pattern {self.pattern}"
        )


def import_bitnet(
    source: str | Path, out: str | Path, *, pattern: str = "dense", overwrite: bool = False
) -> ImportResult:
    """Read a checkpoint of ``quant_method: bitnet`` and write it as a trained directory.

    Args:
        source: directory of the checkpoint; its weights have to be safetensors.
        out: the trained directory to write, new or empty; it appears whole or not at all.
        pattern: N:M to mask to in one shot; dense leaves the weights as they are. γ stays that of
            the dense weight. Where magnitudes are equal, as in weights that were stored ternary,
            zeros go first and then those further right.
        overwrite: replace a trained directory, if it has no files of somebody else.

    Raises:
        PackedFormatError: if the checkpoint is damaged, or its parts contradict each other.
        ConfigError: if it is of another format, uses a part of it that is not known here, or
            ``out`` is there and not to be replaced.
        PatternError: if M does not divide a layer's input features.
        WeightError: if a weight is NaN or infinite.
    """
    source, out = Path(source), Path(out)
    check_place = partial(check_output, out, "a trained model", is_trained, overwrite)
    check_place()
    if not (source / CONFIG).is_file():
        raise PackedFormatError(f"{source} holds no model: there is no {CONFIG}")
    with _reading(source):
        model, rules, ternary, described = _read(source)
    tokenizer = None
    path = source / "tokenizer_config.json"
    if path.is_file():
        if "auto_map" in read_json(path):
            raise ConfigError(f"{path}: this tokenizer is code, which is not run; remove its files")
        tokenizer = load_tokenizer(source)
    conversion = convert(model, pattern, rules=rules)
    lost = sorted(ternary & conversion.skipped.keys())
    if lost:
        raise ConfigError(
            f"{source}: {lost[0]} is ternary there and cannot be here, because "
            f"{conversion.skipped[lost[0]]}; this checkpoint cannot be imported"
        )
    sparsity = SparsityConfig(pattern=pattern, rules=rules)
    run = {"imported": described}
    save_trained(model, tokenizer, out, sparsity, run, check=check_place)
    architecture, modules = type(model).__name__, conversion.modules
    return ImportResult(out, architecture, described, modules, conversion.weights, pattern)


def _read(directory: Path) -> tuple[PreTrainedModel, dict[str, str], set[str], str]:
    """The model with float32 master weights, not converted; ``convert``'s rules for the layers that
    are not ternary; the names of those that are; and the format's."""
    refuse_special(*directory.iterdir())
    config = read_json(directory / CONFIG)
    config.pop("auto_map", None)
    linear_class, mode, skipped = _quantization(config.pop("quantization_config", None), directory)
    stored: dict[str, Tensor] = {}
    for path in weight_files(directory):
        for name, tensor in read_tensors(path).tensors.items():
            if name in stored:
                raise PackedFormatError(f"{path}: tensor {name} is in another file too; {AGAIN}")
            if not DERIVED_BUFFER.search(name):
                stored[name] = tensor
    skeleton = _build(config, len(stored), directory / CONFIG)
    linears = {n: m for n, m in skeleton.named_modules() if isinstance(m, nn.Linear)}
    left = get_keys_to_not_convert(skeleton) if skipped is None else skipped
    if len(left) > len(stored) or not all(
        isinstance(name, str) and len(name) <= LONGEST_NAME and NAME.fullmatch(name)
        for name in left
    ):  # transformers reads them as regular expressions, which can be made to take for ever
        raise PackedFormatError(
            f"{directory / CONFIG}: modules_to_not_convert is {str(left)[:80]}, where names of "
            f"modules are expected; {AGAIN}"
        )
    ternary = {name for name in linears if should_convert_module(name, left)}
    head = skeleton.get_output_embeddings()
    if any(linears[name] is head for name in ternary):
        raise ConfigError(
            f"{directory}: the output head is ternary; here heads stay in full precision, so this "
            "checkpoint cannot be imported"
        )
    known = skeleton.state_dict().keys() | {f"{name}.{SCALE}" for name in ternary}
    if stray := sorted(stored.keys() - known):
        raise PackedFormatError(
            f"{directory}: tensor {stray[0][:LONGEST_NAME]!r} belongs to no part of a "
            f"{type(skeleton).__name__} with this {CONFIG}; {AGAIN}"
        )
    state = dict(_masters(stored, ternary if mode == "offline" else set(), linear_class))
    for name, tensor in state.items():
        check_finite(tensor, name)
    given = {n: state.get(source) for n, source in skeleton.all_tied_weights_keys.items()} | state
    skeleton.load_state_dict({n: t for n, t in given.items() if t is not None}, assign=True)
    with no_bars():
        model: PreTrainedModel = type(skeleton).from_pretrained(
            None, config=skeleton.config, state_dict=state, dtype=torch.float32
        )
    path = directory / "generation_config.json"
    if path.is_file():
        settings = GenerationConfig.from_dict(read_json(path))
        try:
            settings.validate(strict=True)
            model.generation_config = settings
        except ValueError as error:  # many have some that contradict each other
            reason = (str(error).splitlines()[1:2] or [str(error)])[0][:200]
            say(f"warning: {path} is left out, transformers would not write it: {reason}")
    rules = {
        rf"^{re.escape(name)}$": "skip"
        for name, module in skeleton.named_modules()
        if (name in linears and name not in ternary and module is not head)
        or any(weight.dim() == 3 for weight in module.parameters(recurse=False))
    }
    return model.eval(), rules, ternary, f"bitnet ({linear_class}, {mode})"


def _quantization(described: Any, directory: Path) -> tuple[str, str, list[str] | None]:
    """Linear class, mode, and the names that are not converted (None: the default ones)."""
    where = directory / CONFIG
    if not isinstance(described, dict) or described.get("quant_method") != "bitnet":
        raise ConfigError(
            f"{where}: this is no checkpoint of quant_method bitnet; train or convert a model of "
            "float weights with model.source, and pack one of ours as it is"
        )
    linear_class = described.get("linear_class", "bitlinear")
    mode = described.get("quantization_mode", "offline")
    skipped = described.get("modules_to_not_convert")
    if linear_class not in ("bitlinear", "autobitlinear") or mode not in ("offline", "online"):
        raise ConfigError(
            f"{where}: linear_class {str(linear_class)[:40]!r} and quantization_mode "
            f"{str(mode)[:40]!r} are not known; there are bitlinear and autobitlinear, offline and "
            "online"
        )
    if described.get("use_rms_norm"):
        raise ConfigError(
            f"{where}: use_rms_norm puts a norm into every linear layer, which the layers here do "
            "not have; this checkpoint cannot be imported"
        )
    if not isinstance(skipped, list | None):
        raise PackedFormatError(f"{where}: modules_to_not_convert is {str(skipped)[:80]}, no list")
    # The first class knows no other mode, whatever the file says.
    return linear_class, mode if linear_class == "autobitlinear" else "offline", skipped


def _build(config: dict[str, Any], tensors: int, path: Path) -> PreTrainedModel:
    """The model on the meta device; layers take time to build, so no more of them than tensors."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ConfigError(
            f"{path}: transformers has no architecture {str(kind)[:80]!r}; code that comes "
            "with a checkpoint is not run"
        )
    if fetched := foreign_code(config):
        raise PackedFormatError(f"{path}: {fetched}; no code is fetched, get the file again")
    parts: list[tuple[str, Any]] = list(config.items())
    for key, value in parts:  # grows by what is nested
        if isinstance(value, dict | list):
            parts += value.items() if isinstance(value, dict) else [(key, one) for one in value]
        elif isinstance(value, int | float) and COUNTED.search(key) and value > tensors:
            raise PackedFormatError(
                f"{path}: {key[:80]} is {str(value)[:40]}, but there are {tensors} tensors; the "
                "file was edited or damaged, get it again"
            )
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                CONFIG_MAPPING[kind].from_dict(config), dtype=torch.float32
            )
    except Exception as error:  # whatever transformers' constructors raise
        what = f"{type(error).__name__}: {str(error)[:300]}"
        raise PackedFormatError(
            f"{path}: transformers cannot build it ({what}); {AGAIN}"
        ) from error
    return model


def _masters(
    stored: dict[str, Tensor], ternary: set[str], linear_class: str
) -> Iterator[tuple[str, Tensor]]:
    """The state dict of float32 master weights, of layers that are stored in ternary too."""
    with progress("reading bitnet", len(stored)) as task:
        for name, tensor in stored.items():
            module, _, part = name.rpartition(".")
            task.advance()
            if module not in ternary or part not in (SCALE, "weight", "bias"):
                yield name, _floats(tensor, name)
                continue
            if part == SCALE:
                continue
            gamma = _gamma(stored, f"{module}.{SCALE}", linear_class)
            if part == "bias":  # the second linear class scales it together with the product
                scaled = linear_class == "autobitlinear"
                yield name, _floats(tensor, name) * (gamma if scaled else 1.0)
                continue
            packed = tensor.dtype == torch.uint8
            values = row_quarters.unpack(tensor, name) if packed else tensor
            if not packed and (
                linear_class == "bitlinear"
                or not tensor.is_floating_point()
                or not torch.equal(values, values.sign())
            ):
                raise PackedFormatError(
                    f"tensor {name} ({tensor.dtype}) is not ternary, which it has to be beside a "
                    f"{SCALE}; {AGAIN}"
                )
            density = int(values.count_nonzero()) / max(1, values.numel())
            yield name, values.float() * (gamma / density if density else 0.0)


def _gamma(stored: dict[str, Tensor], name: str, linear_class: str) -> float:
    if name not in stored:
        raise PackedFormatError(f"tensor {name} is missing; {AGAIN}")
    tensor = stored[name]
    if tensor.shape not in ((), (1,)) or not tensor.is_floating_point():
        raise PackedFormatError(
            f"tensor {name} is {tensor.dtype} {list(tensor.shape)} where one float is expected; "
            f"{AGAIN}"
        )
    scale = float(tensor)
    gamma = scale if linear_class == "autobitlinear" else 1 / scale if scale else 0.0
    # Absmean scales end at 1e-5; one stored in bfloat16 may be rounded below.
    if not 0.99 * SMALLEST_SCALE < gamma < torch.finfo(torch.float32).max:
        raise PackedFormatError(
            f"tensor {name} is {scale}, which is the scale of no ternary weight; {AGAIN}"
        )
    return gamma


def _floats(tensor: Tensor, name: str) -> Tensor:
    if not tensor.is_floating_point():
        raise PackedFormatError(
            f"tensor {name} is {tensor.dtype} where floats are expected; {AGAIN}"
        )
    return tensor.float()


@contextmanager
def _reading(directory: Path) -> Iterator[None]:
    """Whatever transformers and torch raise for damaged files, in our words."""
    try:
        yield
    except (ConfigError, WeightError):
        raise
    except PackedFormatError as error:
        if str(directory) in str(error):
            raise
        raise PackedFormatError(f"{directory}: {error}") from error
    except Exception as error:
        raise PackedFormatError(
            f"{directory} cannot be read ({type(error).__name__}: {str(error)[:500]}); {AGAIN}"
        ) from error
