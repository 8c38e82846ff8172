"""Plans of the sparse library: made once a shape, found again, destroyed once, then not used.

The library is a counterfeit that writes down what it is asked; products are not computed.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from sparse_bitnet.core import BackendError
from sparse_bitnet.kernels import autotune
from sparse_bitnet.kernels.matmul import cusparselt
from sparse_bitnet.kernels.recent import Recent

ALGORITHMS, MOST = 5, 3
OUT, INNER = 64, 96


class Library:
    """Counts what lives; refuses algorithm 4, and the use of what was destroyed."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.alive: Counter[str] = Counter()
        self.destroyed: set[int] = set()
        self.kept: list[object] = []  # so that no address comes twice
        self.algorithm: int | None = None
        self.used: list[int | None] = []
        self.algorithms: dict[int, int | None] = {}

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            self.calls[name] += 1
            return self.answer(name, arguments) or 0

        return call

    def cusparseLtGetErrorString(self, status: int) -> bytes:
        return b"operation is not supported"

    def answer(self, name: str, arguments: tuple[Any, ...]) -> int | None:
        if name in ("cusparseLtStructuredDescriptorInit", "cusparseLtDenseDescriptorInit"):
            self.make("matrix", arguments[1])
        elif name == "cusparseLtMatmulAlgSelectionInit":
            self.algorithm = None
        elif name == "cusparseLtMatmulAlgSetAttribute":
            self.algorithm = arguments[3]._obj.value
        elif name == "cusparseLtMatmulAlgGetAttribute":
            arguments[3]._obj.value = ALGORITHMS
        elif name == "cusparseLtMatmulPlanInit":
            if self.algorithm == 4:
                return 7
            self.make("plan", arguments[1])
            self.algorithms[id(arguments[1])] = self.algorithm
        elif name == "cusparseLtMatmulGetWorkspace":
            arguments[2]._obj.value = 1000
        elif name == "cusparseLtMatmul":
            assert id(arguments[1]) not in self.destroyed
            self.used.append(self.algorithms[id(arguments[1])])
        elif name in (cusparselt.DESTROY_PLAN, cusparselt.DESTROY_MATRIX):
            assert id(arguments[0]) not in self.destroyed, "destroyed twice"
            self.destroyed.add(id(arguments[0]))
            self.alive["plan" if name == cusparselt.DESTROY_PLAN else "matrix"] -= 1
        return None

    def make(self, kind: str, structure: object) -> None:
        self.kept.append(structure)
        self.alive[kind] += 1

    def living(self) -> dict[str, int]:
        gc.collect()
        return {kind: count for kind, count in self.alive.items() if count}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    fake, memory = Library(), autotune.Memory(None)
    plans: Recent[Any, Any] = Recent(MOST)
    monkeypatch.setattr(cusparselt, "_library", lambda: fake)
    monkeypatch.setattr(cusparselt, "_handle", lambda index: "handle")
    monkeypatch.setattr(cusparselt, "_index", lambda device: 0)
    monkeypatch.setattr(cusparselt, "version", lambda index: 800)
    monkeypatch.setattr(cusparselt, "_plans", plans)
    monkeypatch.setattr(cusparselt, "_workspaces", {})
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    monkeypatch.setattr(autotune, "memory", lambda index: memory)
    monkeypatch.setattr(autotune, "microseconds", lambda calls, settle=0.0: _timed(calls, fake))
    monkeypatch.setattr(autotune, "may_measure", lambda: True)
    yield fake
    plans._values.clear()
    assert fake.living() == {}  # nothing of it is left for a library that is there


def _timed(calls: list[Callable[[], object]], fake: Library) -> float:
    calls[0]()
    return 10.0 - float(fake.used[-1] or 0)  # a higher number is faster


def multiply(tokens: int) -> torch.Tensor:
    x_q = torch.zeros(tokens, INNER, dtype=torch.int8)
    return cusparselt.matmul(x_q, torch.zeros(1, dtype=torch.uint8), torch.ones(OUT))


def test_plans_are_bounded_and_destroyed(library: Library) -> None:
    for tokens in range(16, 16 * 21, 16):
        assert multiply(tokens).shape == (tokens, OUT)
        assert library.living() == {
            "plan": min(tokens // 16, MOST),
            "matrix": 3 * min(tokens // 16, MOST),
        }
    assert set(library.used[-3:]) == {3}  # the fastest that is not refused
    assert len(cusparselt._workspaces) == 1 and len(cusparselt._plans) == MOST
    assert next(iter(cusparselt._workspaces.values())).numel() == 1024


def test_a_plan_used_lately_stays(library: Library) -> None:
    for tokens in (16, 32, 48):
        multiply(tokens)
    multiply(16)
    made = library.calls["cusparseLtMatmulPlanInit"]
    multiply(64)  # in the place of 32
    multiply(16)
    assert library.calls["cusparseLtMatmulPlanInit"] == made + 1
    multiply(32)
    assert library.calls["cusparseLtMatmulPlanInit"] == made + 2


def test_token_counts_that_are_filled_up_share_a_plan(library: Library) -> None:
    multiply(33)
    made = library.calls["cusparseLtMatmulPlanInit"]
    assert multiply(41).shape == (41, OUT)
    assert library.calls["cusparseLtMatmulPlanInit"] == made


@pytest.mark.parametrize("variable", ["0", "1"])
def test_algorithms_are_searched_only_where_measuring_is_allowed(
    library: Library, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv("SPARSE_BITNET_MEASURE", variable)
    multiply(16)
    assert len(library.used) == (1 if variable == "0" else ALGORITHMS - 1 + autotune.FINALISTS + 1)
    assert library.used[-1] == (None if variable == "0" else 3)


def test_a_plan_in_use_outlives_its_place(library: Library) -> None:
    plan = cusparselt._plan(0, 16, OUT, INNER, 2)
    cusparselt._plans.put((0, 16, INNER, OUT), plan)
    for tokens in range(32, 160, 16):
        multiply(tokens)
    assert library.living()["plan"] == MOST + 1
    arguments = (torch.zeros(16, INNER, dtype=torch.int8), torch.zeros(1), torch.ones(OUT))
    cusparselt._run(plan, *arguments, torch.empty(16, OUT))
    del plan
    assert library.living()["plan"] == MOST


def test_nothing_ends_while_a_graph_is_captured(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autotune, "may_measure", lambda: False)
    multiply(16)
    multiply(16)
    assert library.living() == {"plan": 2, "matrix": 6} and not len(cusparselt._plans)
    monkeypatch.setattr(autotune, "may_measure", lambda: True)
    cusparselt._destroy()
    assert library.living() == {}


def test_a_refused_plan_leaves_nothing(library: Library) -> None:
    with pytest.raises(BackendError, match="cusparseLtMatmulPlanInit failed: operation is not"):
        cusparselt._plan(0, 16, OUT, INNER, 4)
    assert library.living() == {}


def test_recent() -> None:
    recent: Recent[str, int] = Recent(2)
    recent.put("a", 1)
    recent.put("b", 2)
    assert recent.get("a") == 1
    recent.put("c", 3)
    assert [recent.get(key) for key in "abc"] == [1, None, 3]
    recent.put("c", 4)
    assert recent.get("c") == 4 and len(recent) == 2
