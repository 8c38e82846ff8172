"""Which rows may be held against each other: those of one size, trained in one setting.

What a sweep varies (kind, pattern, size, seed, length, method, schedule, a learning rate of the
cell's own) is what a report compares. Everything else that decides a figure is the setting: data,
sequence and batch, optimizer, warm-up, how it was measured. Rows of two settings share no
statistic, though they lie in one file and their cells read the same.

A recipe may give each kind an optimizer and a schedule of its own. So of two kinds only data, model
and measurement must agree; their optimizers need not, where neither finds its like in the other.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from sparse_bitnet.core import ConfigError
from sparse_bitnet.study.analysis import Runs, sizes
from sparse_bitnet.study.cells import KINDS
from sparse_bitnet.study.rows import Row
from sparse_bitnet.train.recipe import config_from_dict, identity

# What a cell says, and where the data lay: it counts by content.
NOT_SETTINGS = {
    *("model.source", "run.seed", "schedule.steps", "data.path", "data.mixture"),
    *("sparsity.kind", "sparsity.pattern", "sparsity.method", "sparsity.until"),
}
OF_A_KIND = ("optimizer.", "schedule.")
RATE = "optimizer.learning_rate"


def experiments(rows: Sequence[Row]) -> list[Runs]:
    """The rows by size and setting: sizes, and within a size settings, with most rows first.

    A row whose cell has a learning rate of its own belongs to every setting that agrees with it in
    all else.
    """
    found = []
    for size in sizes(rows):
        finished = [row for row in rows if row.cell.size == size and not row.diverged]
        groups = sorted(_groups(finished), key=len, reverse=True)
        for number, group in enumerate(groups):
            differs = _differences(group, groups[0])
            name = size if number == 0 else f"{size}-{number + 1}"
            found.append(Runs(group, size, name, differs))
    return found


def settings(row: Row) -> dict[str, Any]:
    """Everything that decides a row's figures and is not an axis of a sweep: name → plain value.

    Settings that came with a later version have the default that the row was run with. The peak
    learning rate is among them unless the cell has one of its own.
    """
    found = {k: v for k, v in _configuration(row).items() if k not in NOT_SETTINGS | {RATE}}
    if row.cell.learning_rate is None and row.learning_rate is not None:
        found[RATE] = row.learning_rate
    for section in ("evaluation", "data"):
        values = row.raw.get(section)
        for name, value in (values if isinstance(values, dict) else {}).items():
            place = "evaluation" if section == "evaluation" else "tokens"
            found[f"{place}.{name}"] = bool(value) if name == "cloze_text" else value
    return found


def _configuration(row: Row) -> dict[str, Any]:
    """The training configuration, flat, with the defaults of what it does not name."""
    config = row.raw.get("config")
    if not isinstance(config, dict):
        return {}
    try:
        return identity(config_from_dict(config, f"row {row.key}"))
    except (ConfigError, TypeError, ValueError):
        # A setting that there no longer is: as it stands, without what concerns the run alone.
        return {
            f"{section}.{name}": value
            for section, values in config.items()
            if isinstance(values, dict) and section != "run"
            for name, value in values.items()
        }


def _groups(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows of one size by setting, each kind's own settings paired with the other's."""
    shared: dict[str, dict[str, dict[str, list[Row]]]] = defaultdict(
        lambda: {kind: defaultdict(list) for kind in KINDS}
    )
    with_own_rate = []
    for row in rows:
        every, own = _split(row)
        if row.cell.learning_rate is None:
            shared[_key(every)][row.cell.kind][_key(own)].append(row)
        else:
            with_own_rate.append((row, _key(every), own))
    for row, every_key, own in with_own_rate:
        of_kind = shared[every_key][row.cell.kind]
        alike = [group for key, group in of_kind.items() if _without_rate(key) == own]
        for group in alike or [of_kind[_key(own)]]:
            group.append(row)
    return [group for kinds in shared.values() for group in _paired(kinds)]


def _paired(kinds: Mapping[str, Mapping[str, list[Row]]]) -> list[list[Row]]:
    """One group for settings that both kinds have, then the rest of one with that of the other."""
    first, second = (kinds[kind] for kind in KINDS)
    groups = [first[key] + second[key] for key in first if key in second]
    rest = [
        sorted((rows for key, rows in one.items() if key not in other), key=len, reverse=True)
        for one, other in ((first, second), (second, first))
    ]
    return groups + [[*(a or []), *(b or [])] for a, b in zip_longest(*rest)]


def _split(row: Row) -> tuple[dict[str, Any], dict[str, Any]]:
    """What both kinds must share, and what a kind may have of its own."""
    found = settings(row)
    own = {k: v for k, v in found.items() if k.startswith(OF_A_KIND)}
    return {k: v for k, v in found.items() if k not in own}, own


def _key(values: dict[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)


def _without_rate(key: str) -> dict[str, Any]:
    return {k: v for k, v in json.loads(key).items() if k != RATE}


def _differences(rows: Sequence[Row], main: Sequence[Row]) -> list[str]:
    """``batch size 16 (128)``: what is otherwise than in the main setting, and that in brackets."""
    told: dict[str, None] = {}
    pairs = [(_example(rows, kind), _example(main, kind)) for kind in KINDS]
    both = [(settings(a), settings(b)) for a, b in pairs if a is not None and b is not None]
    # Without a kind in common they part in what both kinds must share.
    for here, there in both or [(_split(rows[0])[0], _split(main[0])[0])]:
        for name in [*here, *(n for n in there if n not in here)]:
            if here.get(name) != there.get(name):
                short = name.rpartition(".")[2].replace("_", " ")
                values = [_shown(one.get(name)) for one in (here, there)]
                told[f"{short} {values[0]} ({values[1]})"] = None
    return list(told)


def _example(rows: Sequence[Row], kind: str) -> Row | None:
    """A row of a kind; one with the recipe's learning rate, whose settings say it, if there is."""
    found = [row for row in rows if row.cell.kind == kind]
    return min(found, key=lambda row: row.cell.learning_rate is not None, default=None)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "not said" if value is None else str(value)[:60]
