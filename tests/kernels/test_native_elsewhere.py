"""The library compiles and links for systems that this one is not, where ziglang is installed."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from sparse_bitnet.kernels import native

TARGETS = ("x86_64-windows-gnu", "x86_64-macos", "aarch64-macos", "aarch64-linux-gnu")


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the first time the compiler builds each system's C++ library
@pytest.mark.skipif(
    find_spec("ziglang") is None, reason="needs ziglang (pip install -c constraints.txt ziglang)"
)
@pytest.mark.parametrize("target", TARGETS)
def test_links(target, tmp_path):
    sources = [str(file) for file in Path(native.__file__).parent.glob("*.cpp")]
    compiler = [sys.executable, "-m", "ziglang", "c++", "-target", target, "-std=c++17", "-O1"]
    output = tmp_path / "library"
    flags = ["-ffp-contract=off", "-shared", "-fPIC", "-o", str(output)]
    if "windows" in target:
        flags.remove("-fPIC")
    command = [*compiler, *flags, *sources]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert output.stat().st_size > 100_000
