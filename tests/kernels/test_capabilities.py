"""What is chosen for GPUs of other generations, asked on a machine that need not have one."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from sparse_bitnet.core import Pattern, WeightError
from sparse_bitnet.kernels import platform, ternarize
from sparse_bitnet.kernels.backward import fp8

OLD, AMPERE, ADA, HOPPER, BLACKWELL = (7, 5), (8, 0), (8, 9), (9, 0), (10, 0)


@pytest.fixture
def gpu(monkeypatch):
    """A stand-in for a tensor on a GPU of that compute capability."""

    def of(capability):
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
def test_kernels_begin_with_sm_80_and_e4m3_with_sm_89(gpu, capability, triton, e4m3):
    tensor = gpu(capability)
    assert platform.runs_triton(tensor) == triton
    assert fp8.has_kernels(tensor) == e4m3


@pytest.mark.parametrize(
    ("capability", "newer"), [(AMPERE, False), (ADA, False), (HOPPER, True), (BLACKWELL, True)]
)
def test_pdl_begins_with_sm_90(monkeypatch, gpu, capability, newer):
    pdl = pytest.importorskip("sparse_bitnet.kernels.pdl")
    tensor = gpu(capability)
    monkeypatch.setattr(pdl, "capability", lambda index: capability)
    pdl._serves.cache_clear()
    assert (pdl.launch_options(tensor) is not pdl.OFF) == newer
    pdl._serves.cache_clear()


@pytest.mark.parametrize("shard_sizes", [(3,), (3, 4), (0, 8)])
def test_shard_sizes_are_checked_before_a_kernel_runs(monkeypatch, shard_sizes):
    module = importlib.import_module("sparse_bitnet.kernels.ternarize")
    monkeypatch.setattr(module, "runs_triton", lambda tensor: True)
    weight = torch.randn(8, 16)
    with pytest.raises(WeightError, match="sum to its 8 rows"):
        ternarize(weight, Pattern(6, 8), None, shard_sizes)
