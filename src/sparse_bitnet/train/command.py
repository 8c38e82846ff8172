"""The verb ``train``. It reads its own arguments, because a recipe's keys are its options."""

from __future__ import annotations

import os

from sparse_bitnet.console import out
from sparse_bitnet.core import ConfigError
from sparse_bitnet.train.loop import train_recipe
from sparse_bitnet.train.recipe import options_help
from sparse_bitnet.train.result import TrainResult

USAGE = "sparse-bitnet train RECIPE.yaml [--section.key value ...]"


def train_command(arguments: list[str]) -> None:
    """``sparse-bitnet train recipes/demo.yaml --optimizer.learning-rate 1e-3``.

    Prints the result to standard output, on the first rank only.

    Raises:
        ConfigError: if the recipe is missing; and as :func:`sparse_bitnet.train.train`.
    """
    if "-h" in arguments or "--help" in arguments:
        out.print(options_help(), markup=False)
        return
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError(f"the recipe comes first: {USAGE}")
    result = train_recipe(arguments[0], arguments[1:])
    if os.environ.get("RANK", "0") == "0":
        out.print(describe(result), markup=False)


def describe(result: TrainResult) -> str:
    """The result in lines for people."""
    lines = [
        f"steps       {result.steps:,} ({result.tokens:,} tokens)",
    ]
    if result.loss is not None:
        lines.append(f"loss        {result.loss:.4f} nats a token at the last step")
    if result.validation_loss is not None:
        lines.append(
            f"validation  {result.validation_loss:.4f} nats a token, perplexity "
            f"{result.perplexity:.2f}"
        )
    lines.append(f"metrics     {result.history}")
    if result.checkpoint is not None:
        lines.append(f"checkpoint  {result.checkpoint}")
    if result.model_directory is not None:
        lines.append(f"model       {result.model_directory}")
    return "\n".join(lines)
