"""The verb ``kernels``."""

import pytest
import torch

from sparse_bitnet.core import ConfigError
from sparse_bitnet.kernels import explain as module
from sparse_bitnet.kernels import native
from sparse_bitnet.kernels.explain import explain
from sparse_bitnet.kernels.matmul import hopper
from sparse_bitnet.kernels.matmul.hopper_plan import Plan, cheapest
from sparse_bitnet.kernels.registry import backend_of


def test_says_what_serves_the_cpu_and_why() -> None:
    backend = backend_of(torch.device("cpu"))
    told = explain("cpu")
    assert told == (
        f"cpu: packed weights are multiplied by {backend.name} ({native.explanation()})"
    )


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="device 'cudaa' cannot be used here"):
        explain("cudaa")


def test_plans_of_a_hopper_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(tokens: int, out: int, columns: int, _: int) -> Plan:
        return cheapest(tokens, out, columns, 132, lambda tile, splits, n: n * splits < 500)

    monkeypatch.setattr(hopper, "plan", plan)
    lines = module._plans(0)
    assert len(lines) == 1 + len(module.LAYERS) * len(module.TOKENS)
    assert any("down" in line and "(" in line for line in lines[1:])  # K is cut
