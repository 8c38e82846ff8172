"""The one thing that pyproject.toml cannot say without a warning: the compiled CPU kernel.

It is optional: where there is no C++ compiler the package installs, and the reference serves.
"""

from pathlib import Path

from setuptools import Extension, setup

SOURCES = "src/sparse_bitnet/kernels/native"
HERE = Path(__file__).parent


def files(*patterns: str) -> list[str]:
    found = [path for pattern in patterns for path in (HERE / SOURCES).glob(pattern)]
    return sorted(path.relative_to(HERE).as_posix() for path in found)


setup(
    ext_modules=[
        Extension(
            "sparse_bitnet.kernels.native._native",
            files("*.cpp"),
            depends=files("*.h", "*.inc"),
            language="c++",
            # No instruction set here: each file names its own, and the processor is asked at run
            # time. A contraction of x·s + b would skip a rounding that the reference makes.
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-g0",
                "-ffp-contract=off",
                "-fvisibility=hidden",
                "-Wno-maybe-uninitialized",
                "-Wno-unused-function",
            ],
            optional=True,
        )
    ]
)
