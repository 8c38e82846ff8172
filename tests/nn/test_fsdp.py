"""FSDP2 on two processes trains as one process does."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("fsdp_worker.py")
RANKS = 2


def load_worker() -> Any:
    spec = importlib.util.spec_from_file_location("fsdp_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = load_worker()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of every scenario, from one pair of processes: their start takes longest."""
    directory = tmp_path_factory.mktemp("fsdp")
    result = directory / "result.json"
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), str(RANKS), directory / "store", result],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        output = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(output)
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("name", worker.SCENARIOS)
def test_same_losses_as_one_process(two_ranks: dict[str, Any], name: str, threads: None) -> None:
    scenario = worker.SCENARIOS[name]
    expected = worker.run(scenario, 0, 1)
    found = two_ranks[name]
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)


def test_edits_of_shards_are_seen(two_ranks: dict[str, Any], threads: None) -> None:
    expected, found = worker.edited()["sums"], two_ranks["edited"]["sums"]
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert len({round(value, 3) for value in found}) == len(found)


def test_weights_that_a_forward_cannot_use_are_refused(two_ranks: dict[str, Any]) -> None:
    assert "was torch.float32 and is torch.bfloat16 in this forward" in two_ranks["refused"]["bf16"]
    assert "is sharded here" in two_ranks["refused"]["alone"]


def test_state_dict_is_that_of_the_dense_model(two_ranks: dict[str, Any]) -> None:
    assert two_ranks["state dict"]
