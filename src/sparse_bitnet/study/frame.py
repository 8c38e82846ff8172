"""Rows as one pandas table: a line a run, its figures beside those of its dense baseline.

A sweep varies kind, pattern, size, seed, training length, method and schedule. Everything else
that decides a figure is the *setting*: data, sequence and batch, optimizer, evaluation. Runs are
averaged over seeds, and compared with a baseline, only within one setting.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pandas as pd

from sparse_bitnet.core import ConfigError, Pattern
from sparse_bitnet.study.rows import Row, is_number
from sparse_bitnet.train.recipe import config_from_dict, identity

# The axes of a cell, and the data's path: data count by content.
NOT_SETTINGS = {
    *("model.source", "run.seed", "schedule.steps", "data.path", "data.mixture"),
    *("sparsity.kind", "sparsity.pattern", "sparsity.method", "sparsity.until"),
}
OF_A_KIND = ("optimizer.", "schedule.")
SAME_TRAINING = ["size", "kind", "tokens per weight", "setting", "seed"]
GROUP = ["size", "tokens per weight", "method", "schedule", "setting"]


def frame(rows: Sequence[Row]) -> pd.DataFrame:
    """One line a run that gave a perplexity; a run that two rows record counts once.

    Columns: those of :data:`GROUP`, ``kind``, ``pattern``, ``density``, ``seed``, ``key``; the
    figures ``perplexity``, ``cloze``, ``zeros``; ``ratio`` to the dense baseline (same size, kind,
    length, setting and seed; published method, sparse from scratch) and ``over published``, the
    perplexity minus that of the published method from scratch at the same pattern.
    """
    done = [row for row in rows if not row.diverged]
    labels = setting_labels(done)
    runs = pd.DataFrame(
        {
            "key": row.key,
            "size": row.cell.size,
            "kind": row.cell.kind,
            "pattern": row.cell.pattern,
            "density": Pattern.parse(row.cell.pattern).density,
            "seed": row.cell.seed,
            "tokens per weight": row.cell.tokens_per_weight,
            "method": row.cell.method,
            "schedule": row.cell.schedule,
            "setting": labels[row.key],
            "perplexity": row.perplexity,
            "cloze": row.accuracy,
            "zeros": row.zeros,
        }
        for row in done
    ).astype({"cloze": float, "zeros": float})
    runs = runs.drop_duplicates([*GROUP, "kind", "pattern", "seed"], keep="last")
    plain = runs[(runs.method == "published") & (runs.schedule == "scratch")]
    for name, reference, keys in (
        ("dense", plain[plain.pattern == "dense"], SAME_TRAINING),
        ("published", plain, [*SAME_TRAINING, "pattern"]),
    ):
        found = reference[[*keys, "perplexity"]].rename(columns={"perplexity": name})
        runs = runs.merge(found, on=keys, how="left", validate="many_to_one")
    runs["ratio"] = runs.perplexity / runs.dense
    runs["over published"] = runs.perplexity - runs.published
    return runs.drop(columns=["dense", "published"])


def setting_labels(rows: Sequence[Row]) -> dict[str, str]:
    """Row's key → in what its setting differs from the main one of its size and kind.

    The main setting has the data, batch and evaluation that most rows of the size have, and the
    optimizer and schedule that most of those of the kind have: a recipe may give each kind its own.
    Its label is empty; another's is ``batch size 16, warmup 0.1``.
    """
    settings = {row.key: _settings(row) for row in rows}
    labels = {}
    for size in {row.cell.size for row in rows}:
        of_size = [row for row in rows if row.cell.size == size]
        shared = _commonest({k: _part(settings[k], own=False) for k in (r.key for r in of_size)})
        for kind in {row.cell.kind for row in of_size}:
            keys = [row.key for row in of_size if row.cell.kind == kind]
            alike = [key for key in keys if _part(settings[key], own=False) == shared] or keys
            main = shared | _commonest({key: _part(settings[key], own=True) for key in alike})
            for key in keys:
                labels[key] = _differences(settings[key], main)
    return labels


def _part(settings: dict[str, Any], own: bool) -> dict[str, Any]:
    """What a kind may have of its own, or what both kinds share."""
    return {k: v for k, v in settings.items() if k.startswith(OF_A_KIND) == own}


def _commonest(settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    texts = Counter(json.dumps(values, sort_keys=True) for values in settings.values())
    values: dict[str, Any] = json.loads(texts.most_common(1)[0][0])
    return values


def _differences(here: dict[str, Any], main: dict[str, Any]) -> str:
    return ", ".join(
        f"{name.rpartition('.')[2].replace('_', ' ')} {_shown(here.get(name))}"
        for name in sorted({*here, *main})
        if here.get(name) != main.get(name)
    )


def _settings(row: Row) -> dict[str, Any]:
    """Everything that decides a row's figures and is not an axis of a sweep."""
    found = {k: v for k, v in _configuration(row).items() if k not in NOT_SETTINGS}
    found["optimizer.learning_rate"] = row.learning_rate
    for section, place in (("evaluation", "evaluation"), ("data", "tokens")):
        values = row.raw.get(section)
        for name, value in (values if isinstance(values, dict) else {}).items():
            found[f"{place}.{name}"] = bool(value) if name == "cloze_text" else value
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def _configuration(row: Row) -> dict[str, Any]:
    """The training configuration, flat, with the defaults of what it does not name."""
    config = row.raw.get("config")
    if not isinstance(config, dict):
        return {}
    try:
        return identity(config_from_dict(config, f"row {row.key}"))
    except (ConfigError, TypeError, ValueError):
        # A setting that no longer exists: as recorded, without what concerns the run alone.
        return {
            f"{section}.{name}": value
            for section, values in config.items()
            if isinstance(values, dict) and section != "run"
            for name, value in values.items()
        }


def _shown(value: Any) -> str:
    if value is None:
        return "not recorded"
    return f"{value:g}" if is_number(value) else str(value)[:60]


def mean_text(values: pd.Series, digits: int = 3, sign: str = "") -> str:
    """``1.074 ± 0.012 (3 seeds)``, the sample standard deviation; empty without a value."""
    values = values.dropna()
    if values.empty:
        return "–"
    text = f"{values.mean():{sign}.{digits}f}".replace("-", "−")
    if len(values) == 1:
        return f"{text} (1 seed)"
    return f"{text} ± {values.std():.{digits}f} ({len(values)} seeds)"
