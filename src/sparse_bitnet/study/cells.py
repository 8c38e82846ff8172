"""A sweep's recipe (docs/study.md has one): blocks of settings that expand to cells, each a run."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, NonNegativeInt, PositiveInt, with_config

from sparse_bitnet.core import ConfigError, Pattern, SparseBitNetError, shown
from sparse_bitnet.train.config import STRICT, Positive, TrainConfig
from sparse_bitnet.train.presets import PRESETS
from sparse_bitnet.train.recipe import checked, config_from_dict, identity, read_yaml

# The method's names in recipes, rows and reports.
METHODS: dict[str, dict[str, Any]] = {
    "published": {},
    "mask-then-quant": {"order": "mask-then-quant"},
    "mask-from-quantized": {"mask_source": "quantized"},
    "masked-gradient": {"gradient": "masked"},
    "4-bit-activations": {"activation_bits": 4},
}
Kind = Literal["bf16", "bitnet"]
# Settings of a training recipe that each cell of a sweep sets, by the axis to give instead.
SET_BY_CELLS = {
    **{("model", "source"): "size", ("run", "seed"): "seed"},
    ("schedule", "steps"): "tokens_per_weight",
    **{("sparsity", axis): axis for axis in ("kind", "pattern", "method", "until")},
}


def _ascending(until: Any) -> Any:
    return tuple(sorted(until.items())) if isinstance(until, dict) else until or ()


PatternText = Annotated[str, AfterValidator(lambda text: str(Pattern.parse(text)))]


@with_config(STRICT)
@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    kind: Kind = "bitnet"
    pattern: PatternText = "6:8"  # that training ends with
    size: str = "study-5m"  # a key of PRESETS
    seed: int = 0  # of weights and data order
    method: str = "published"  # a key of METHODS
    # (fraction of training, pattern until then), ascending; empty for sparse from scratch.
    until: Annotated[tuple[tuple[float, PatternText], ...], BeforeValidator(_ascending)] = ()
    tokens_per_weight: Positive = 100.0  # training tokens over the weights of the linears
    learning_rate: float | None = None  # the highest of the schedule; None for the recipe's

    def __post_init__(self) -> None:
        for name, choices in (("size", PRESETS), ("method", METHODS)):
            if (value := getattr(self, name)) not in choices:
                raise ConfigError(f"{name} is {shown(value)}; choose among {', '.join(choices)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values as a recipe and a row hold them."""
        return {**dataclasses.asdict(self), "until": dict(self.until)}

    @property
    def schedule(self) -> str:
        """``scratch``, or what comes before the final pattern: ``dense to 25%``."""
        if not self.until:
            return "scratch"
        return ", ".join(f"{pattern} to {fraction:.0%}" for fraction, pattern in self.until)

    def __str__(self) -> str:
        extra = [self.method] if self.method != "published" else []
        extra += [self.schedule] if self.until else []
        extra += [f"rate {self.learning_rate:g}"] if self.learning_rate is not None else []
        text = f", {', '.join(extra)}" if extra else ""
        return (
            f"{self.kind} {self.pattern} {self.size} seed {self.seed} "
            f"{self.tokens_per_weight:g} t/w{text}"
        )


@dataclass(frozen=True)
class Evaluation:
    """What is measured when a cell's training has ended."""

    window: NonNegativeInt = 0  # tokens, of the perplexity; 0: the training sequence length
    validation_tokens: NonNegativeInt = 0  # of the validation split that count; 0: all
    cloze_text: str = ""  # documents (jsonl:PATH or another source); empty: no cloze
    cloze_questions: PositiveInt = 1000


@dataclass(frozen=True)
class Job:
    """A cell with all that is needed to run it."""

    key: str  # see run_key
    cell: Cell
    config: TrainConfig
    evaluation: Evaluation

    @property
    def tokens(self) -> int:
        data = self.config.data
        return self.config.schedule.steps * data.batch_size * data.sequence_length

    @property
    def window(self) -> int:
        """Tokens that the model reads at once when it is measured."""
        return self.evaluation.window or self.config.data.sequence_length


@with_config(STRICT)
@dataclass(frozen=True)
class SweepRecipe:
    """A recipe as it is written, and the cells that it expands to, each once."""

    name: str = ""
    base: dict[str, dict[str, Any]] = field(default_factory=dict)
    kinds: dict[Kind, dict[str, dict[str, Any]]] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    evaluation: Evaluation = field(default_factory=Evaluation)
    blocks: list[dict[str, Any]] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        for kind, sections in (("base", self.base), *self.kinds.items()):
            for (part, name), axis in SET_BY_CELLS.items():
                if name in sections.get(part, {}):
                    remedy = f"give {axis} in a block or in defaults"
                    raise ConfigError(f"{kind}: {part}.{name} would have no effect; {remedy}")
            if "directory" in sections.get("run", {}):
                raise ConfigError(f"{kind}: run.directory: a sweep gives each run its own")
        if not self.blocks:
            raise ConfigError("no cells; add blocks")

    def config(self, cell: Cell) -> TrainConfig:
        """The whole training configuration of a cell (its directory is set by the sweep).

        Raises:
            ConfigError: as :func:`sparse_bitnet.train.recipe.config_from_dict`.
        """
        sparsity = {
            "kind": cell.kind,
            "pattern": cell.pattern,
            "method": METHODS[cell.method],
            "until": dict(cell.until),
        }
        rate = {} if cell.learning_rate is None else {"learning_rate": cell.learning_rate}
        own: dict[str, Any] = {"model": {"source": cell.size}, "run": {"seed": cell.seed}}
        own |= {"sparsity": sparsity, "optimizer": rate}
        values: dict[str, Any] = {}
        for layer in (self.base, self.kinds.get(cell.kind, {}), own):
            for section, fields in layer.items():
                values[section] = {**values.get(section, {}), **fields}
        config = config_from_dict(values, f"sweep {self.name}, {cell}")
        wanted = cell.tokens_per_weight * PRESETS[cell.size].linear_weights
        steps = round(wanted / (config.data.batch_size * config.data.sequence_length))
        return replace(config, schedule=replace(config.schedule, steps=max(1, steps)))


def read_sweep(path: str | Path) -> SweepRecipe:
    """Read a sweep recipe.

    Raises:
        ConfigError: for a file that cannot be read, an unknown key, a value out of range.
    """
    path = Path(path)
    recipe = checked(SweepRecipe, read_yaml(path) or {}, str(path))
    recipe = replace(recipe, name=recipe.name or path.stem)
    # Two cells may be one run: one of them repeats the recipe's own learning rate.
    seen = set()
    for index, block in enumerate(recipe.blocks):
        name = block.get("name", f"block {index + 1}")
        for cell in _expand(block, recipe.defaults, f"{path}, {shown(name)}"):
            key = run_key(recipe.config(cell), recipe.evaluation, {})
            if key not in seen:
                seen.add(key)
                recipe.cells.append(cell)
    return recipe


def run_key(config: TrainConfig, evaluation: Evaluation, data: dict[str, Any]) -> str:
    """Twelve hex digits of everything that decides a run's figures.

    The data count by content (``data``, from :func:`sparse_bitnet.study.run_cell.data_facts`), not
    by path: rows made on another machine are recognised.
    """
    settings = identity(config)
    settings = {k: v for k, v in settings.items() if k not in ("data.path", "data.mixture")}
    measured = dataclasses.asdict(evaluation)
    measured["cloze_text"] = bool(evaluation.cloze_text)
    text = json.dumps([settings, measured, data], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def key_today(row: dict[str, Any]) -> str:
    """The key that a row's cell has now, from the settings that the row records.

    A version of the package that adds a setting changes all keys; what a row was run with is the
    new setting's default, so its cell is still finished. A row that does not record enough, or
    whose settings are refused today, keeps the key it was written with.
    """
    written = str(row["key"])
    try:
        config = config_from_dict(row["config"], f"row {written}")
        return run_key(config, Evaluation(**row["evaluation"]), row["data"])
    except (SparseBitNetError, KeyError, TypeError, AttributeError):
        return written


def _expand(block: dict[str, Any], defaults: dict[str, Any], place: str) -> Iterator[Cell]:
    axes = {key: value for key, value in block.items() if key not in ("name", "cells")}
    lists = [value if isinstance(value, list) else [value] for value in axes.values()]
    for name, listed in zip(axes, lists, strict=True):
        if not listed:
            raise ConfigError(f"{place}: {name} is an empty list; leave it out or give values")
    cells = checked(list[dict[str, Any]], block.get("cells", [{}]), f"{place}, cells")
    for explicit in cells or [{}]:
        for values in itertools.product(*lists):
            chosen = {**defaults, **dict(zip(axes, values, strict=True)), **explicit}
            yield checked(Cell, chosen, place)
