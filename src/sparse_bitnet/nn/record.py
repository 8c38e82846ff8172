"""What the directory of a converted model says, so that nothing loads it as a dense one.

The weight files that ``save_pretrained`` (and so ``Trainer``) writes of a converted model are those
of a dense one: float32 master weights under their own names, from which training resumes. Two
entries of ``config.json`` tell them apart:

    "quantization_config": {"quant_method": "sparse_bitnet_trained", "pattern": "6:8", …}
    "transformers_weights": ABSENT

By the first, transformers converts the model again while it loads it, if this package is imported
(packed/quantizer.py). Without, transformers warns of a method that it does not know and goes on, to
a dense model. The second stops it: it names the file to read, there is none, and its name says what
to do. transformers leaves it out of every ``config.json`` it saves, so it is added to the file.

The entries are in the file only. A model's configuration has none of them, because dense models may
be made from it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sparse_bitnet.core import ConfigError, Method, Pattern
from sparse_bitnet.files import write_text
from sparse_bitnet.version import __version__

QUANT_METHOD = "sparse_bitnet_trained"
SIDE_FILE = "sparse_bitnet.json"  # what train/export.py writes beside a trained model's weights
ABSENT = "to load these weights - pip install sparse-bitnet, import sparse_bitnet.safetensors"
TEMPLATES = "additional_chat_templates"  # a folder, of a tokenizer that has several
# What this package and transformers write into the directory of a language model.
WRITTEN = re.compile(
    r"(generation_)?config\.json|sparse_bitnet\.json|hf_plugin\.py|"
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|"
    r"tokenizer\.(json|model)|tokenizer_config\.json|special_tokens_map\.json|"
    r"added_tokens\.json|vocab\.(json|txt)|merges\.txt|(spiece|sentencepiece[\w.]*)\.model|"
    r"chat_template\.(jinja|json)"
)


def is_record(described: object) -> bool:
    """True if a ``quantization_config``, as read from JSON, is of a converted model."""
    return isinstance(described, dict) and described.get("quant_method") == QUANT_METHOD


def name_in(model: nn.Module, name: str, known: Iterable[str]) -> str | None:
    """A stored name as this model calls it: a base model has no prefix, a full model has one."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        if candidate in known:
            return candidate
    return None


def modules_here(model: nn.Module, recorded: dict[str, str | None]) -> dict[str, str | None]:
    """Recorded modules as this model calls them, without those of a head that it does not have.

    Raises:
        ConfigError: if it lacks another one, or none was recorded.
    """
    if not recorded:
        raise ConfigError("no converted module is recorded")
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    has_head = any(name.startswith(prefix) for name in recorded)  # the saved model
    names = {name for name, _ in model.named_modules()}
    found: dict[str, str | None] = {}
    for name, pattern in recorded.items():
        here = name_in(model, name, names)
        if here is not None:
            found[here] = pattern
        elif name.startswith(prefix) or not has_head:
            raise ConfigError(f"it has no module {name}")
    return found


def refuse_files_of_others(directory: Path) -> None:
    """Refuse to replace a directory with a file in it that is of no model.

    Raises:
        ConfigError: naming the file.
    """
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        if path.name != TEMPLATES if path.is_dir() else not WRITTEN.fullmatch(path.name):
            raise ConfigError(
                f"{directory} holds {path.name}, which would be lost: the whole directory is "
                "replaced; move it away, or give another name"
            )


@dataclass
class SavePretrained:
    """transformers' ``save_pretrained`` of one model, with entries of ours in ``config.json``.

    It replaces the model's own method, because transformers has no hook that knows the directory
    once ``config.json`` is in it. Unlike a bound method, it is copied and pickled with the model.

    Args:
        entries: what the configuration has while it is written, and else has not.
        finish: called with the directory once it is written.
    """

    model: Any
    entries: dict[str, Any]
    finish: Callable[[Path], None]

    def __call__(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        *args: Any,
        **options: Any,
    ) -> None:
        """Save the model.

        Raises:
            ConfigError: for ``push_to_hub``, which would upload before the directory is complete.
        """
        if push_to_hub:
            raise ConfigError("save_pretrained: upload it by model.push_to_hub(repository)")
        save = type(self.model).save_pretrained
        for name, value in self.entries.items():
            setattr(self.model.config, name, value)
        try:
            save(self.model, save_directory, is_main_process, state_dict, False, *args, **options)
        finally:
            for name in self.entries:
                delattr(self.model.config, name)
        if is_main_process:
            self.finish(Path(save_directory))


def _name_absent_weights(directory: Path) -> None:
    (directory / SIDE_FILE).unlink(missing_ok=True)  # of a model that was there before
    path = directory / "config.json"
    values = json.loads(path.read_text(encoding="utf-8")) | {"transformers_weights": ABSENT}
    write_text(path, json.dumps(values, indent=2) + "\n")


def record(
    model: nn.Module,
    modules: dict[str, str | None],
    pattern: Pattern,
    kind: str,
    method: Method,
    rules: dict[str, str],
) -> None:
    """Let ``save_pretrained`` of a converted model, and of every transformers model inside it (the
    base model), describe the conversion.

    Args:
        modules: the converted ones by name, each with the pattern that a rule gave it.
    """
    for prefix, part in model.named_modules():
        if not (hasattr(part, "save_pretrained") and hasattr(part, "config")):
            continue
        inside = f"{prefix}." if prefix else ""
        own = {n.removeprefix(inside): p for n, p in modules.items() if n.startswith(inside)}
        described = {
            "quant_method": QUANT_METHOD,
            "version": __version__,
            "pattern": str(pattern),
            "kind": kind,
            "method": asdict(method),
            "rules": rules,
            "modules": own,
        }
        if own:
            entries = {"quantization_config": described}
            part.save_pretrained = SavePretrained(part, entries, _name_absent_weights)


def record_pattern(model: nn.Module, pattern: Pattern) -> None:
    """Write down another pattern."""
    for part in model.modules():
        save = vars(part).get("save_pretrained")
        if isinstance(save, SavePretrained):
            save.entries["quantization_config"]["pattern"] = str(pattern)


def forget(config: Any) -> None:
    """Let a configuration describe the dense model of the master weights."""
    if is_record(getattr(config, "quantization_config", None)):
        del config.quantization_config
    if getattr(config, "transformers_weights", None) == ABSENT:
        del config.transformers_weights
