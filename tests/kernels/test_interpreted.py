"""Starts the interpreter's tests in two processes where it is on from the beginning."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FILES = sorted(map(str, (Path(__file__).parent / "interpreted").glob("test_*.py")))


@pytest.mark.parametrize("half", [0, 1])
def test_interpreted(half):
    # Without the models of tests/packed_models.py, whose imports take seconds.
    without = ["-p", "no:cacheprovider", "-p", "no:packed_models"]
    command = [sys.executable, "-m", "pytest", "-q", *without, *FILES[half::2]]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        env={k: v for k, v in environment.items() if not k.startswith("PYTEST_")},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    # 5 would mean that nothing was collected.
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
