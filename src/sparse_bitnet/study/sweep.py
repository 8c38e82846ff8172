"""``sweep``: run every cell of a recipe on the GPUs or CPU at hand, and write a row for each.

Worker processes are pinned to GPUs, several side by side on one where that is faster (small models
leave most of a big GPU idle), or share the CPU. Finished cells are recognised by the hash of their
settings; one that was killed goes on from its last checkpoint, if the recipe writes any.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from sparse_bitnet.console import Task, progress, say
from sparse_bitnet.core import ConfigError
from sparse_bitnet.data import open_source
from sparse_bitnet.evaluate.cloze import cloze_items
from sparse_bitnet.files import locked, write_text
from sparse_bitnet.study.cells import Job, SweepRecipe, key_today, read_sweep, run_key
from sparse_bitnet.study.pool import GRACE_SECONDS, Message, Worker, started
from sparse_bitnet.study.rows import ROWS_FILE, append_row, read_rows
from sparse_bitnet.study.run_cell import check_model, data_facts
from sparse_bitnet.train.signals import StopRequest, TrainingInterruptedError, stop_on_signals

HISTORY_ROWS = 200
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class SweepResult:
    """What a sweep came to."""

    rows: Path  # the file with a line for each finished cell
    done: int  # cells, in this call and before
    failed: dict[str, str]  # cell → reason, of this call
    left: list[str]  # cells not run, for want of time or after a failure

    @property
    def exit_code(self) -> int:
        """What the command line exits with: 1 if a cell failed."""
        return 1 if self.failed else 0


def sweep(
    recipe: str | Path,
    out: str | Path,
    *,
    minutes: float = math.inf,
    per_gpu: int = 1,
    cpu_workers: int = 1,
    scratch: str | Path | None = None,
    keep_runs: bool = False,
    dry_run: bool = False,
) -> SweepResult:
    """Run a sweep to its end, or on from where it was stopped.

    Args:
        recipe: a sweep recipe (docs/study.md tells how to write one), cells in order of value.
        out: receives rows.jsonl, sweep.yaml (the recipe) and logs/.
        minutes: then no cell is started any more, and what still runs saves and leaves.
        per_gpu: workers side by side on each GPU.
        cpu_workers: workers where there is no GPU.
        scratch: where runs live until their row is written; OUT/cells by default.
        keep_runs: keep their directories afterwards, and export their models into them.
        dry_run: list what would be run, and run nothing.

    Raises:
        ConfigError: for a recipe that cannot be read, a pattern or a window that does not fit the
            model, or if another sweep runs in ``out``.
        DataError: if the tokens or the cloze questions' documents are missing.
        TrainingInterruptedError: after SIGTERM or Ctrl-C, once workers have saved and left.
    """
    began = time.monotonic()
    for name, value in (("per-gpu", per_gpu), ("cpu-workers", cpu_workers)):
        if value < 1:
            raise ConfigError(f"sweep: --{name} is {value}; at least 1")
    if not minutes > 0:
        raise ConfigError(f"sweep: --minutes is {minutes}; above 0")
    plan, out = read_sweep(recipe), Path(out)
    jobs = _jobs(plan, Path(scratch) if scratch else out / "cells", keep_runs)
    if plan.evaluation.cloze_text:  # before anything is trained
        cloze_items(open_source(plan.evaluation.cloze_text), limit=1)
    for job in jobs:
        check_model(job)
    rows_path = out / ROWS_FILE
    if dry_run:
        waiting = _waiting(plan, jobs, rows_path)
        for job in waiting:
            say(f"  {job.key}  {job.cell}  {_millions(job.tokens)} tokens")
        if waiting:
            say(f"{_millions(sum(job.tokens for job in waiting))} tokens together; nothing was run")
        return SweepResult(rows_path, len(jobs) - len(waiting), {}, [str(j.cell) for j in waiting])
    busy = ConfigError(f"another sweep is running in {out}; wait, or choose another directory")
    with locked(out / ".lock", busy), stop_on_signals() as stop:
        waiting = _waiting(plan, jobs, rows_path)
        write_text(out / "sweep.yaml", Path(recipe).read_text(encoding="utf-8"))
        run = _Sweep(jobs, waiting, rows_path, began + 60 * minutes, keep_runs)
        places = _places(per_gpu, cpu_workers)[: len(waiting)]
        if places:
            steps = sum(job.config.schedule.steps for job in waiting)
            with (
                started(places, out / "logs") as workers,
                progress(f"sweep {plan.name}, steps", steps) as task,
            ):
                run.work(workers, task, stop)
    left = [str(job.cell) for job in run.waiting]
    finished = len(jobs) - len(left) - len(run.failed)
    say(
        f"sweep {plan.name}: {finished} of {len(jobs)} cells finished, {len(run.failed)} failed, "
        f"{len(left)} left, {time.monotonic() - began:.0f} s; "
        + (f"rows in {rows_path}" if rows_path.exists() else "the same command goes on")
    )
    if stop and left:
        raise TrainingInterruptedError(
            f"sweep {plan.name}: stopped by {stop.name}; the same command goes on", stop.number
        )
    return SweepResult(rows_path, finished, run.failed, left)


def _waiting(plan: SweepRecipe, jobs: list[Job], rows_path: Path) -> list[Job]:
    """The cells without a row; reports what it found."""
    rows, problems = read_rows(rows_path) if rows_path.is_file() else ([], [])
    for problem in problems:
        say(problem)
    done = {key_today(row.raw) for row in rows}
    others = done - {job.key for job in jobs}
    if others:
        say(f"{rows_path} holds {len(others)} rows of other cells or settings; a report shows all")
    waiting = [job for job in jobs if job.key not in done]
    say(
        f"sweep {plan.name}: {len(jobs)} cells, {len(jobs) - len(waiting)} finished before, "
        f"{len(waiting)} to run"
    )
    return waiting


class _Sweep:
    """What is waiting, what has failed; a thread a worker hands out cells and takes messages."""

    def __init__(
        self, jobs: list[Job], waiting: list[Job], rows: Path, deadline: float, keep_runs: bool
    ) -> None:
        self.waiting, self.rows_path = waiting, rows
        self.deadline, self.keep_runs = deadline, keep_runs
        self.failed: dict[str, str] = {}
        self.stopping, self._lock = False, Lock()
        self._steps_done = dict.fromkeys((job.key for job in waiting), 0)
        self._cells, self._cells_done = len(jobs), len(jobs) - len(waiting)

    def work(self, workers: list[Worker], task: Task, stop: StopRequest) -> None:
        """Hand out cells until none is left or fits before the deadline, or a signal arrives."""
        with ThreadPoolExecutor(len(workers)) as threads:
            running = [threads.submit(self._serve, worker, workers, task) for worker in workers]
            try:
                while wait(running, POLL_SECONDS, FIRST_EXCEPTION).not_done and not stop:
                    if self._out_of_time():
                        say("sweep: out of time; asking what still runs to save and leave")
                        break
                    if any(one.done() and one.exception() for one in running):
                        break
                self.stopping = True
                for worker in workers:
                    worker.process.terminate()  # what is idle takes no notice
                wait(running, GRACE_SECONDS)
            finally:  # a second Ctrl-C comes here at once
                self.stopping = True
                for worker in workers:
                    if worker.busy:
                        worker.process.kill()
        for one in running:
            one.result()

    def _serve(self, worker: Worker, workers: list[Worker], task: Task) -> None:
        """A worker's thread: give it the next cell, in the recipe's order, while there is one."""
        while True:
            with self._lock:
                if self.stopping or not self.waiting or self._out_of_time():
                    return
                job = self.waiting.pop(0)
            for message in worker.run(job):
                with self._lock:
                    self._handle(job, message, workers, task)

    def _handle(self, job: Job, message: Message, workers: list[Worker], task: Task) -> None:
        steps = job.config.schedule.steps
        if "row" in message:
            row = {"key": job.key, **message["row"]}
            places = [worker.environment.get("CUDA_VISIBLE_DEVICES") for worker in workers]
            row["environment"]["side_by_side"] = max(map(places.count, places))
            append_row(self.rows_path, row)
            self._cells_done += 1
            if not self.keep_runs:
                shutil.rmtree(job.config.run.directory, ignore_errors=True)
            say(f"done: {job.cell}: {_figures(row)}")
        elif "failed" in message and not self.stopping:
            self.failed[str(job.cell)] = message["failed"]
            say(f"failed: {job.cell}: {message['failed']}")
        elif "done" in message:
            steps = message["done"]
        else:
            self.waiting.insert(0, job)
            steps = self._steps_done[job.key]
        busy = sum(worker.busy for worker in workers)
        cells = f"{self._cells_done} of {self._cells} cells, {busy} running"
        failed = f", {len(self.failed)} failed" if self.failed else ""
        task.advance(steps - self._steps_done[job.key], cells + failed)
        self._steps_done[job.key] = steps

    def _out_of_time(self) -> bool:
        return time.monotonic() > self.deadline


def _jobs(plan: SweepRecipe, scratch: Path, export: bool = False) -> list[Job]:
    facts: dict[str, dict[str, Any]] = {}
    jobs = []
    for cell in plan.cells:
        config = plan.config(cell)
        place = json.dumps([config.data.path, config.data.mixture])
        if place not in facts:
            facts[place] = data_facts(config)
        key = run_key(config, plan.evaluation, facts[place])
        given = {name for part in (plan.base, *plan.kinds.values()) for name in part.get("run", {})}
        # Where the recipe does not say: the end is measured on the whole validation split; a
        # checkpoint is a person's choice.
        chosen: dict[str, Any] = {
            "log_every": max(1, config.schedule.steps // HISTORY_ROWS),
            "layers_every": 0,
            "validation_sequences": 0,
            "checkpoint_every": 0,
            "export": export,
        }
        chosen = {name: value for name, value in chosen.items() if name not in given}
        run = replace(config.run, directory=str(scratch / key), **chosen)
        config = replace(config, run=run)
        jobs.append(Job(key, cell, config, plan.evaluation))
    return jobs


def _places(per_gpu: int, cpu_workers: int) -> list[dict[str, str]]:
    """Environment of each worker: one GPU and no other, or its share of the cores."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    gpus = gpus if torch.cuda.is_available() else []
    workers = per_gpu * len(gpus) or cpu_workers
    # The cores this process may use, not all of the machine.
    cores = len(os.sched_getaffinity(0))
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // workers))
    own = {"OMP_NUM_THREADS": threads}
    if not gpus:
        return [own] * cpu_workers
    return [{"CUDA_VISIBLE_DEVICES": gpu.strip()} | own for _ in range(per_gpu) for gpu in gpus]


def _millions(tokens: int) -> str:
    return f"{tokens / 1e6:,.0f}M" if tokens >= 10e6 else f"{tokens / 1e6:.2g}M"


def _figures(row: dict[str, Any]) -> str:
    if row["status"] != "done":
        return f"{row['status']}: {row['problem']}"
    rate = row["tokens_per_second"] or 0
    return f"perplexity {row['validation']['perplexity']:.3f}, {rate:,.0f} tokens/s"
