"""What is chosen for GPUs of other generations, asked on a machine that need not have one."""

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparse_bitnet.core import BackendError, Pattern, WeightError
from sparse_bitnet.kernels import dispatch, platform, ternarize, tuning
from sparse_bitnet.kernels.backward import fp8
from sparse_bitnet.kernels.weight import TernaryWeight, prepare

Capability = tuple[int, int]
OLD, AMPERE, ADA, HOPPER, BLACKWELL = (7, 5), (8, 0), (8, 9), (9, 0), (10, 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[Capability], Any]:
    """A stand-in for a tensor on a GPU of that compute capability."""

    def of(capability: Capability) -> Any:
        for module in (platform, fp8):
            monkeypatch.setattr(module, "capability", lambda index: capability)
        monkeypatch.setattr(platform, "has_triton", lambda: True)
        return SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), shape=(4096, 4096))

    return of


@pytest.mark.parametrize(
    ("capability", "triton", "e4m3"),
    [
        (OLD, False, False),
        (AMPERE, True, False),
        (ADA, True, True),
        (HOPPER, True, True),
        (BLACKWELL, True, True),
    ],
)
def test_kernels_begin_with_sm_80_and_e4m3_with_sm_89(
    gpu: Callable[[Capability], Any], capability: Capability, triton: bool, e4m3: bool
) -> None:
    tensor = gpu(capability)
    assert platform.runs_triton(tensor) == triton
    assert fp8.has_kernels(tensor) == e4m3


@pytest.mark.parametrize(
    ("capability", "newer"), [(AMPERE, False), (ADA, False), (HOPPER, True), (BLACKWELL, True)]
)
def test_descriptors_and_early_launches_begin_with_sm_90(
    monkeypatch: pytest.MonkeyPatch,
    gpu: Callable[[Capability], Any],
    capability: Capability,
    newer: bool,
) -> None:
    triton_dense = pytest.importorskip("sparse_bitnet.kernels.matmul.triton_dense")
    early = pytest.importorskip("sparse_bitnet.kernels.early")
    tensor = gpu(capability)
    for module in (triton_dense, early):
        monkeypatch.setattr(module, "capability", lambda index: capability)
    early._serves.cache_clear()
    assert (early.launch_options(tensor) is not early.OFF) == newer
    early._serves.cache_clear()
    for rows in (1, 40, 100, 4096):
        tensor.shape, tensor.data_ptr = (rows, 4096), lambda: 4096
        names = triton_dense.candidates(tensor, tensor)
        assert names
        tiles = [triton_dense.CANDIDATES[name] for name in names]
        assert any(t.descriptors for t in tiles) == (newer and rows > 16)


def test_an_older_gpu_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(dispatch, "capability", lambda index: OLD)
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    choice = dispatch.without_triton(device, packed=False)
    assert choice == dispatch.Choice("reference", "compute capability 7.5 is below 8.0")
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    assert "Triton is not installed" in dispatch.without_triton(device, packed=False).why


@pytest.mark.parametrize("segments", [(3,), (3, 4), (0, 8)])
def test_segments_are_checked_before_a_kernel_runs(
    monkeypatch: pytest.MonkeyPatch, segments: tuple[int, ...]
) -> None:
    module = importlib.import_module("sparse_bitnet.kernels.ternarize")
    monkeypatch.setattr(module, "runs_triton", lambda tensor: True)
    weight = torch.randn(8, 16)
    with pytest.raises(WeightError, match="sum to its 8 rows"):
        ternarize(weight, Pattern(6, 8), None, segments)


def on_gpu(monkeypatch: pytest.MonkeyPatch) -> tuple[TernaryWeight, tuning.Memory]:
    """A weight that dispatch takes for one on a GPU, where nothing has been measured."""
    weight = prepare(torch.zeros(32, 64, dtype=torch.int8), torch.ones(32))
    memory = tuning.Memory(None)
    monkeypatch.setattr(tuning, "memory", lambda index: memory)
    monkeypatch.setattr(tuning, "may_measure", lambda: True)
    monkeypatch.setattr(dispatch, "runs_triton", lambda tensor: True)
    names = ["dense", "packed", "windows"]
    monkeypatch.setattr(dispatch, "backends", lambda weight, tokens, dtype: names)
    return weight, memory


def test_nothing_is_measured_for_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, memory = on_gpu(monkeypatch)
    assert dispatch.choose(weight, 0).backend == "packed"
    assert memory.keys() == []


def test_a_rule_chooses_where_there_is_no_room_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring needs copies of a weight; a prompt may fit without them."""
    measure = pytest.importorskip("sparse_bitnet.kernels.measure")
    weight, memory = on_gpu(monkeypatch)
    asked = []

    def full(*arguments: Any) -> None:
        asked.append(arguments)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(measure, "measure", full)
    assert dispatch.choose(weight, 4096).backend == "windows"
    assert asked and memory.keys() == []


def test_measuring_leaves_out_what_this_gpu_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = pytest.importorskip("sparse_bitnet.kernels.measure")
    weight, memory = on_gpu(monkeypatch)
    monkeypatch.setattr(measure, "copies", lambda weight: [weight])
    monkeypatch.setattr(measure, "backends", lambda *arguments: ["dense", "windows"])

    def linear(x: Any, weight: Any, bias: Any, dtype: Any, backend: str) -> None:
        if backend == "windows":
            raise BackendError("cusparseLtMatmulPlanInit failed: not supported")

    def microseconds(calls: Any, settle: float = 0.0) -> float:
        if "128x256" in str(calls[0].args[1:]):
            raise measure.OutOfResources(196608, 101376, "shared memory")
        return 5.0

    monkeypatch.setattr(measure, "ternary_linear", linear)
    monkeypatch.setattr(tuning, "microseconds", microseconds)
    monkeypatch.setattr(measure.triton_dense, "candidates", lambda x, w: ["128x256 tma", "128x128"])
    assert measure.measure(weight, 300) == {"dense": 5.0}
    assert memory.get(measure.triton_dense.memory_key(300, 32, 64)) == {"128x128": 5.0}


def test_an_algorithm_that_is_refused_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_bitnet.kernels.matmul import cusparselt

    memory = tuning.Memory(None)
    monkeypatch.setattr(tuning, "memory", lambda index: memory)
    monkeypatch.setattr(cusparselt, "version", lambda index: 800)
    taken = {3, None}

    def plan(index: int, tokens: int, out: int, inner: int, algorithm: int | None) -> Any:
        if algorithm not in taken:
            raise BackendError("cusparseLtMatmulPlanInit failed: not supported")
        return algorithm

    monkeypatch.setattr(cusparselt, "_plan", plan)
    x: Any = SimpleNamespace(device=torch.device("cuda", 0), shape=(48, 64))
    y: Any = SimpleNamespace(shape=(48, 32))
    none: Any = None
    key = "cusparselt 800 64x32x64"
    for times, expected in (
        ({"7": 1.0, "3": 2.0}, 3),
        ({"7": 1.0}, None),
        ({"damaged": 1.0, "3": 2.0}, 3),
    ):
        memory.put(key, times)
        assert cusparselt._chosen(x, none, none, y) == expected
