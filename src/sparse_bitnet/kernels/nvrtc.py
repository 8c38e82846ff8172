"""CUDA C++ compiled at run time (NVRTC), kept on disk, launched through the CUDA driver.

Users need no CUDA toolkit: NVRTC and its Python bindings (``cuda-bindings``) come with CUDA builds
of PyTorch. A kernel is compiled once for each set of macros and each architecture, in less than a
second, and kept in ``files.cache_folder()``.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sparse_bitnet import files
from sparse_bitnet.core.errors import BackendError


@cache
def has_nvrtc() -> bool:
    """True where the compiler and its bindings are; CUDA builds of PyTorch bring both."""
    try:
        from cuda.bindings import nvrtc

        return int(nvrtc.nvrtcVersion()[0]) == 0
    except (ImportError, RuntimeError, OSError):
        return False


def compile_source(source: str, macros: Mapping[str, int], architecture: str) -> bytes:
    """Machine code (cubin) of CUDA C++ that includes nothing.

    Args:
        source: of one ``extern "C"`` kernel.
        macros: name → value, defined ahead of the source.
        architecture: for example ``sm_90a``.

    Raises:
        BackendError: with the compiler's message.
    """
    from cuda.bindings import nvrtc

    text = "".join(f"#define {name} {value}\n" for name, value in macros.items()) + source
    options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17", b"--fmad=false"]
    version = nvrtc.nvrtcVersion()[1:]
    digest = hashlib.sha256(repr((text, options, version)).encode()).hexdigest()[:32]
    kept = _kept(digest)
    if kept is not None and kept.exists():
        return kept.read_bytes()

    def done(result: Sequence[Any]) -> Any:
        if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise BackendError(f"NVRTC: {result[0].name}{_log(nvrtc, program)}")
        return result[1] if len(result) > 1 else None

    program = nvrtc.nvrtcCreateProgram(text.encode(), b"kernel.cu", 0, [], [])[1]
    try:
        done(nvrtc.nvrtcCompileProgram(program, len(options), options))
        code = bytearray(done(nvrtc.nvrtcGetCUBINSize(program)))
        done(nvrtc.nvrtcGetCUBIN(program, code))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    if kept is not None:
        # A folder that cannot be written costs time at the next start, no more.
        with contextlib.suppress(OSError), files.atomic_file(kept) as partial:
            partial.write_bytes(code)
    return bytes(code)


def _kept(digest: str) -> Path | None:
    try:
        return files.cache_folder() / f"{digest}.cubin"
    except RuntimeError:  # no home directory
        return None


def _log(nvrtc: Any, program: Any) -> str:
    size = nvrtc.nvrtcGetProgramLogSize(program)[1]
    text = bytearray(size)
    nvrtc.nvrtcGetProgramLog(program, text)
    return ": " + bytes(text).decode(errors="replace").strip("\0\n")[:2000]


@dataclass(eq=False)
class Kernel:
    """One compiled kernel, loaded into a device's context at its first launch there.

    Args:
        source, macros: as of :func:`compile_source`.
        name: of the ``extern "C"`` function.
        threads: of a block.
        shared_bytes: dynamic shared memory of a block.
    """

    source: str
    macros: Mapping[str, int]
    name: str
    threads: int
    shared_bytes: int
    architecture: str = "sm_90a"
    _functions: dict[int, Any] = field(default_factory=dict)

    def load(self) -> Any:
        """The driver's handle of the kernel on PyTorch's current device."""
        device = torch.cuda.current_device()
        function = self._functions.get(device)
        if function is None:
            from cuda.bindings import driver

            code = compile_source(self.source, self.macros, self.architecture)
            module = check(driver.cuModuleLoadData(code))
            function = check(driver.cuModuleGetFunction(module, self.name.encode()))
            limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            check(driver.cuFuncSetAttribute(function, limit, self.shared_bytes))
            self._functions[device] = function
        return function

    def launch(
        self, blocks: int, arguments: Sequence[int], cluster: int = 1, dependent: bool = True
    ) -> None:
        """Enqueue on PyTorch's current stream.

        Args:
            blocks: of the grid.
            arguments: address of each kernel parameter's value.
            cluster: consecutive blocks that form a cluster.
            dependent: programmatic dependent launch: the kernel may begin before the one ahead of
                it has ended, and waits for it itself.
        """
        from cuda.bindings import driver

        function = self.load()
        config = self._config(blocks, cluster, dependent)
        config.hStream = driver.CUstream(torch.cuda.current_stream().cuda_stream)
        pointers = (ctypes.c_void_p * len(arguments))(*arguments)
        check(driver.cuLaunchKernelEx(config, function, ctypes.addressof(pointers), 0))

    def resident_clusters(self, cluster: int) -> int:
        """Clusters of that many blocks that run on the current device at the same time."""
        from cuda.bindings import driver

        config = self._config(cluster, cluster, dependent=False)
        return int(check(driver.cuOccupancyMaxActiveClusters(self.load(), config)))

    def _config(self, blocks: int, cluster: int, dependent: bool) -> Any:
        from cuda.bindings import driver

        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = self.threads, 1, 1
        config.sharedMemBytes = self.shared_bytes
        kinds = driver.CUlaunchAttributeID
        size = driver.CUlaunchAttribute()
        size.id = kinds.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        dimension = size.value.clusterDim
        dimension.x, dimension.y, dimension.z = cluster, 1, 1
        attributes = [size]
        if dependent:
            pdl = driver.CUlaunchAttribute()
            pdl.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            pdl.value.programmaticStreamSerializationAllowed = 1
            attributes.append(pdl)
        config.attrs, config.numAttrs = attributes, len(attributes)
        return config


def check(result: Sequence[Any]) -> Any:
    if int(result[0]) != 0:
        raise BackendError(f"CUDA driver: {result[0].name}")
    return result[1] if len(result) > 1 else None
