"""FSDP2 on two processes trains as one process does, and derives after each step."""

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
    assert expected["fresh"]
    assert found["fresh"]
    if scenario.bf16:
        # Activations are bf16 here; that is a rounding, not another mask or scale.
        assert found["losses"] == pytest.approx(expected["losses"], abs=2e-2)
    else:
        assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)


@pytest.mark.parametrize("name", worker.SCENARIOS)
def test_derives_once_a_step(two_ranks: dict[str, Any], name: str) -> None:
    """Once in every step, whatever the number of micro-batches. (The first forward after sharding
    may find the weights in new tensors and look once more.)"""
    scenario = worker.SCENARIOS[name]
    modules = 10 if scenario.architecture == "mixtral" else 14
    first, *later = two_ranks[name]["derived"]
    assert first in (modules, 2 * modules)
    assert later == [modules] * (worker.STEPS - 1)


def test_state_dict_is_that_of_the_dense_model(two_ranks: dict[str, Any]) -> None:
    assert two_ranks["state dict"]
