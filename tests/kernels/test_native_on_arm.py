"""The NEON path, cross-compiled and emulated where this machine is no ARM."""

import shutil
import subprocess
from pathlib import Path

import pytest

from sparse_bitnet.kernels import native

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
    reason=f"needs {COMPILER} and {EMULATOR} (apt install g++-aarch64-linux-gnu qemu-user)",
)
def test_products_on_arm(tmp_path):
    library, program = Path(native.__file__).parent, tmp_path / "program"
    sources = [str(file) for file in library.glob("*.cpp")]
    main = str(Path(__file__).parent / "native_on_arm.cpp")
    flags = ["-std=c++17", "-O3", "-ffp-contract=off", "-static", f"-I{library}"]
    subprocess.run([COMPILER, *flags, main, *sources, "-o", str(program)], check=True)
    for processor, paths in (("max", "portable neon"), ("cortex-a53", "portable")):
        run = subprocess.run(
            [EMULATOR, "-cpu", processor, str(program)], capture_output=True, text=True, check=True
        )
        assert run.stdout == f"paths: {paths}\nwrong: 0\n"
