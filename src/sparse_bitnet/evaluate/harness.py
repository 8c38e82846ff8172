"""Tasks of lm-evaluation-harness (lm-eval): its own by name, or YAML files in a folder.

With a folder, lm-eval's thousands of built-in tasks are not even indexed, so a local task whose
data lie in local files runs without a network. A task's YAML may name Python functions to run: take
folders from people you trust.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparse_bitnet.core import ConfigError, DataError, MissingExtraError
from sparse_bitnet.evaluate.scoring import check_window, evaluating

DEFAULT_BATCH = 8


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    few_shot: int | None = None,
    limit: int | None = None,
    window: int | None = None,
    batch_size: int | None = None,
) -> dict[str, dict[str, float]]:
    """Run lm-eval tasks on a loaded model, on its device.

    Args:
        tasks: names of tasks, groups or tags.
        include_path: a folder of task YAML files, instead of lm-eval's own tasks.
        few_shot: examples in the prompt; each task's own number by default.
        limit: at most this many items a task, for trying out.
        window: as :func:`check_window` has it; longer prompts lose their beginning.
        batch_size: prompts at once; 8 by default.

    Returns:
        ``{task: {metric: value}}``, as lm-eval computes them: ``acc``, ``acc_stderr``, … A metric
        computed through a filter of the task is named ``metric,filter``.

    Raises:
        MissingExtraError: if lm-eval is not installed.
        ConfigError: without tasks, or for one that does not exist (naming those that do).
        DataError: if ``include_path`` is not a directory.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingExtraError(
            "tasks need lm-evaluation-harness: pip install 'sparse-bitnet[eval]'"
        ) from error
    if not tasks:
        raise ConfigError("no tasks were given: name one or more tasks of lm-eval")
    if include_path is not None and not Path(include_path).is_dir():
        raise DataError(f"{include_path}: no such directory of task YAML files")
    with _quiet(), evaluating(model):
        manager = TaskManager(
            include_path=None if include_path is None else str(include_path),
            include_defaults=include_path is None,
        )
        if unknown := [task for task in tasks if task not in manager.all_tasks]:
            there = "`lm-eval ls tasks` lists them"
            if include_path is not None:
                there = f"there are: {', '.join(sorted(manager.all_tasks)) or 'none'}"
            place = include_path or "lm-eval"
            raise ConfigError(f"task {', '.join(unknown)} does not exist in {place}; {there}")
        harness = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size or DEFAULT_BATCH,
            max_length=check_window(model, window),
        )
        report = simple_evaluate(
            model=harness,
            tasks=list(tasks),
            num_fewshot=few_shot,
            limit=limit,
            task_manager=manager,
            log_samples=False,
        )
    # Its keys are ``metric,filter``, beside some that are not numbers.
    return {
        name: {
            key.removesuffix(",none"): float(value)
            for key, value in found.items()
            if "," in key and isinstance(value, int | float)
        }
        for name, found in report["results"].items()
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Errors only: lm-eval warns at length about being given a model instead of its name."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
