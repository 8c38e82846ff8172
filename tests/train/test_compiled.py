"""Compiled blocks learn what eager ones learn, on any processor and whoever compiled before."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("compiled_step.py")
HAS_AVX2 = torch.cpu.get_capabilities().get("avx2", False)
CAPABILITIES = [None, "default", *(["avx2"] if HAS_AVX2 else [])]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One compile cache for all processors, as in a home that machines share."""
    return tmp_path_factory.mktemp("compiled")


def worst_error(cache, capability, *arguments):
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    environment.pop("ATEN_CPU_CAPABILITY", None)
    environment |= {} if capability is None else {"ATEN_CPU_CAPABILITY": capability}
    command = [sys.executable, str(WORKER), *arguments]
    return float(subprocess.run(command, env=environment, check=True, stdout=-1).stdout)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("kind", "precision", "bound"),
    [
        # Roundings to bf16, 2⁻⁹ each, that the compiler skips move some integers by one of 127.
        ("bitnet", "bf16", 5e-2),
        ("bitnet", "fp32", 2e-2),
        ("bf16", "fp32", 1e-4),
        ("bf16", "bf16", 5e-2),
    ],
)
@pytest.mark.slow
def test_gradients_as_in_eager_mode(cache, capability, kind, precision, bound):
    assert worst_error(cache, capability, kind, precision) < bound


@pytest.mark.slow  # 20 s
def test_without_vector_instructions(cache):
    """Scalar code of a gated MLP; nn/test_compiled_rows.py compiles the usual code."""
    assert worst_error(cache, "default", "bitnet", "bf16", "mlp") < 5e-2
