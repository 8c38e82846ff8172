"""Rows as one pandas table: a line a run, its figures beside those of its dense baseline.

A sweep varies kind, pattern, size, seed, training length, method and schedule. Everything else
that decides a figure is the *setting*: data, sequence and batch, optimizer, evaluation. Runs are
averaged over seeds, and compared with a baseline, only within one setting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pandas as pd

from sparse_bitnet.core import ConfigError, Pattern
from sparse_bitnet.study.rows import Row
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
    table = pd.DataFrame(map(_settings, rows), index=[row.key for row in rows])
    table = table.reindex(columns=sorted(table)).fillna("not recorded")
    own = [name for name in table if name.startswith(OF_A_KIND)]
    shared = table.columns.difference(own)
    labels = {}
    for _, of_size in table.groupby({row.key: row.cell.size for row in rows}):
        usual = _commonest(of_size[shared])
        for _, of_kind in of_size.groupby({row.key: row.cell.kind for row in rows}):
            alike = of_kind[(of_kind[shared] == usual).all(axis=1)]
            main = pd.concat([usual, _commonest((of_kind if alike.empty else alike)[own])])
            for key, values in of_kind.iterrows():
                other = values[values != main[values.index]]
                labels[str(key)] = ", ".join(
                    f"{name.rpartition('.')[2].replace('_', ' ')} {text[:60]}"
                    for name, text in other.items()
                )
    return labels


def _commonest(settings: pd.DataFrame) -> pd.Series:
    values, _ = Counter(map(tuple, settings.to_numpy())).most_common(1)[0]
    return pd.Series(values, settings.columns, dtype=object)


def _settings(row: Row) -> dict[str, str]:
    """Everything that decides a row's figures and is not an axis of a sweep."""
    try:
        found = identity(config_from_dict(row.config, f"row {row.key}"))
    except (ConfigError, TypeError, ValueError):
        # A setting that no longer exists: as recorded, without what concerns the run alone.
        sections = {name: values for name, values in row.config.items() if name != "run"}
        found = {f"{name}.{k}": v for name, values in sections.items() for k, v in values.items()}
    measured = row.evaluation | {"cloze_text": bool(row.evaluation.get("cloze_text"))}
    found |= {f"tokens.{name}": value for name, value in row.data.items()}
    found |= {f"evaluation.{name}": value for name, value in measured.items()}
    found["optimizer.learning_rate"] = row.learning_rate
    return {k: str(v) for k, v in found.items() if k not in NOT_SETTINGS and v is not None}


def mean_text(values: pd.Series, digits: int = 3, sign: str = "") -> str:
    """``1.074 ± 0.012 (3 seeds)``, the sample standard deviation; empty without a value."""
    values = values.dropna()
    if values.empty:
        return "–"
    text = f"{values.mean():{sign}.{digits}f}".replace("-", "−")
    if len(values) == 1:
        return f"{text} (1 seed)"
    return f"{text} ± {values.std():.{digits}f} ({len(values)} seeds)"
