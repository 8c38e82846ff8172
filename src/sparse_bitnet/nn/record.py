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
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from sparse_bitnet.core import ConfigError, Method, Pattern
from sparse_bitnet.files import write_text

QUANT_METHOD = "sparse_bitnet_trained"
ABSENT = "to load these weights - pip install sparse-bitnet, import sparse_bitnet.safetensors"


def is_record(described: object) -> bool:
    """True if a ``quantization_config``, as read from JSON, is of a converted model."""
    return isinstance(described, dict) and described.get("quant_method") == QUANT_METHOD


def record(model: Any, pattern: Pattern, kind: str, method: Method, rules: dict[str, str]) -> None:
    """Describe a conversion in a transformers model's configuration; others have none."""
    config: Any = getattr(model, "config", None)
    if not (hasattr(config, "save_pretrained") and hasattr(model, "save_pretrained")):
        return
    config.quantization_config = {
        "quant_method": QUANT_METHOD,
        "version": version("sparse-bitnet"),
        "pattern": str(pattern),
        "kind": kind,
        "method": asdict(method),
        "rules": rules,
    }
    # A partial, unlike a bound method, is copied and pickled with the model.
    model.save_pretrained = partial(save_pretrained, model)


def record_pattern(model: nn.Module, pattern: Pattern) -> None:
    """Write down another pattern."""
    described = getattr(getattr(model, "config", None), "quantization_config", None)
    if is_record(described):
        described["pattern"] = str(pattern)  # type: ignore[index]


def forget(config: Any) -> None:
    """Let a configuration describe the dense model of the master weights."""
    if is_record(getattr(config, "quantization_config", None)):
        del config.quantization_config
    if getattr(config, "transformers_weights", None) == ABSENT:
        del config.transformers_weights


def save_pretrained(
    model: Any,
    save_directory: str | Path,
    is_main_process: bool = True,
    *,
    push_to_hub: bool = False,
    **options: Any,
) -> None:
    """transformers' ``save_pretrained`` of a converted model.

    Raises:
        ConfigError: for ``push_to_hub``, which would upload before the directory is complete.
    """
    if push_to_hub:
        raise ConfigError(
            "save_pretrained: upload a converted model by model.push_to_hub(repository)"
        )
    type(model).save_pretrained(model, save_directory, is_main_process, **options)
    path = Path(save_directory) / "config.json"
    if is_main_process and is_record(getattr(model.config, "quantization_config", None)):
        values = json.loads(path.read_text(encoding="utf-8"))
        write_text(path, json.dumps(values | {"transformers_weights": ABSENT}, indent=2) + "\n")
