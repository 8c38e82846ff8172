"""Processes of tests, forked from one that has imported PyTorch and transformers already.

That import takes four seconds of a core, again in every process that is started in another way.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

SECONDS = 240
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["sparse_bitnet.train", "transformers.models.qwen2.modeling_qwen2", "torch._dynamo"]
)


def run_processes(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """What a function of an importable module returns for each arguments, computed side by side.

    The first that fails, fails all: the others may wait for it.
    """
    found: dict[Connection, Any] = {}
    processes = []
    try:
        for arguments in calls:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_call, args=(theirs, function, arguments))
            process.start()
            theirs.close()
            processes.append(process)
            found[ours] = None
        pending = list(found)
        while pending:
            ready = wait(pending, SECONDS)
            assert ready, f"{len(pending)} of {len(calls)} processes not ready after {SECONDS} s"
            for connection in ready:
                found[connection], error = connection.recv()
                assert error is None, error
                pending.remove(connection)
        for process in processes:
            process.join(SECONDS)
    finally:
        for process in processes:
            process.kill()
    return list(found.values())


def train_on_ranks(recipe: Path, ranks: int) -> None:
    """What ``torchrun`` does with a recipe, without its own start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_processes(_train_as_rank, [(rank, ranks, port, recipe) for rank in range(ranks)])


def _train_as_rank(rank: int, ranks: int, port: int, recipe: Path) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(n) for name, n in place.items()}}
    from sparse_bitnet.train import load_recipe, train

    train(load_recipe(recipe))


def _call(connection: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        connection.send((function(*arguments), None))
    except BaseException:
        connection.send((None, traceback.format_exc()))
