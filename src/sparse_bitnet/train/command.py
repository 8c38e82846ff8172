"""The verb ``train``. It reads its own arguments, because a recipe's keys are its options."""

from __future__ import annotations

import os

from sparse_bitnet.core import ConfigError
from sparse_bitnet.train.loop import train
from sparse_bitnet.train.recipe import load_recipe, options_help
from sparse_bitnet.train.result import TrainResult

USAGE = "sparse-bitnet train RECIPE.yaml [--section.key value ...]"


def train_command(arguments: list[str]) -> TrainResult | str | None:
    """``sparse-bitnet train recipes/demo.yaml --optimizer.learning-rate 1e-3``.

    Returns:
        What to print: the help, or the result on the first rank.

    Raises:
        ConfigError: if the recipe is missing; and as :func:`sparse_bitnet.train.train`.
    """
    if "-h" in arguments or "--help" in arguments:
        return options_help()
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError(f"the recipe comes first: {USAGE}")
    result = train(load_recipe(arguments[0], arguments[1:]))
    return result if os.environ.get("RANK", "0") == "0" else None
