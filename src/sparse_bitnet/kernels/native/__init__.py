"""The compiled library: int8 activations × packed ternary weights on a CPU, through ctypes.

C++ without a link to PyTorch, compiled when the package is installed. One file an instruction set,
all of them in one library, so that a wheel runs on any processor: which one is used is decided when
it runs. Without a compiler the package installs all the same, and the reference serves.

``SPARSE_BITNET_CPU`` names the path to use: one of :data:`PATHS`, or ``reference`` for none.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_bitnet import console
from sparse_bitnet.core.errors import BackendError, ConfigError

PATHS = ("portable", "neon", "avx2", "avx-vnni", "avx512-vnni", "amx")
"""Instruction sets, each preferred to those before it; the order of ``PathId`` in native.h."""
REFERENCE = "reference"
VARIABLE = "SPARSE_BITNET_CPU"
LAYOUTS = ("two-bit", "six-bit", "bytes", "float32", "bfloat16", "float16")
"""The order of ``Layout`` in native.h; a float weight is as it is."""
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
"""The values of ``Type`` in native.h."""

_PATH_IDS = {name: i for i, name in enumerate(PATHS)}
_LAYOUT_IDS = {name: i for i, name in enumerate(LAYOUTS)}
_arguments = struct.Struct("=17q").pack  # struct Linear in native.h
_ternarize_arguments = struct.Struct("=10q").pack  # struct Ternarize in native.h
_forced: list[str] = []


def _file() -> Path | None:
    here = Path(__file__).parent
    candidates = (here / f"_native{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((file for file in candidates if file.exists()), None)


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why there is none; says so once."""
    file = _file()
    if file is None:
        why = "the CPU kernel was not compiled when the package was installed"
    else:
        try:
            library = ctypes.CDLL(str(file))
            library.sparse_bitnet_paths.restype = ctypes.c_int64
            library.sparse_bitnet_reads_six_bit.argtypes = [ctypes.c_int64]
            library.sparse_bitnet_linear.argtypes = [ctypes.c_char_p]
            library.sparse_bitnet_linear.restype = ctypes.c_int64
            library.sparse_bitnet_ternarize.argtypes = [ctypes.c_char_p]
            library.sparse_bitnet_ternarize.restype = ctypes.c_int64
            library.sparse_bitnet_step.argtypes = [ctypes.c_void_p]
            library.sparse_bitnet_step.restype = ctypes.c_int64
            _share_threads(library)
            return library, ""
        except (OSError, AttributeError) as error:
            why = f"the CPU kernel cannot be loaded ({error})"
    if os.environ.get(VARIABLE) != REFERENCE:
        console.say(
            f"{why}: the reference serves, several times slower; install a C++ compiler and "
            f"reinstall sparse-bitnet, or set {VARIABLE}={REFERENCE} to keep this quiet"
        )
    return None, why


def _share_threads(library: ctypes.CDLL) -> None:
    """Let products run on PyTorch's OpenMP workers, which a pool beside them would fight."""
    parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None) if os.name == "posix" else None
    if parallel is not None:
        library.sparse_bitnet_use_openmp.argtypes = [ctypes.c_void_p]
        library.sparse_bitnet_use_openmp(ctypes.cast(parallel, ctypes.c_void_p))


@cache
def available() -> tuple[str, ...]:
    """The paths that this processor can run, the preferred one first; empty without the library."""
    library, _ = _load()
    if library is None:
        return ()
    bits = library.sparse_bitnet_paths()
    return tuple(name for i, name in reversed(tuple(enumerate(PATHS))) if bits >> i & 1)


def path() -> str:
    """The path in use; ``reference`` if none is. The environment is read once.

    Raises:
        ConfigError: if ``SPARSE_BITNET_CPU`` names no path.
        BackendError: if it names one that this processor, or this installation, lacks.
    """
    return _forced[-1] if _forced else _default_path()


@cache
def _default_path() -> str:
    if value := os.environ.get(VARIABLE):
        return checked(value, f"{VARIABLE}={value}")
    return (*available(), REFERENCE)[0]


def checked(name: str, where: str) -> str:
    """``name`` if it is a path that runs here.

    Raises:
        ConfigError, BackendError: as :func:`path`.
    """
    if name == REFERENCE or name in available():
        return name
    if name not in PATHS:
        raise ConfigError(f"{where}: {name!r} is no path; choose among {(*PATHS, REFERENCE)}")
    why = _load()[1] or "this processor lacks its instructions"
    raise BackendError(f"{where}: {why}; choose among {(*available(), REFERENCE)}")


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Use this path inside the block.

    Raises:
        ConfigError, BackendError: as :func:`path`.
    """
    _forced.append(checked(name, "forced"))
    try:
        yield
    finally:
        _forced.pop()


def explanation() -> str:
    """The path in use and why it is that one."""
    name = path()
    if name == REFERENCE and not available():
        return f"plain PyTorch integer arithmetic: {_load()[1]}"
    if _forced or os.environ.get(VARIABLE):
        return f"{name}, as {'forced' if _forced else VARIABLE + ' asks'}"
    return f"{name}, the best that this processor has of {', '.join(available())}"


def reads_six_bit() -> bool:
    """Whether the path in use reads groups of four in six bits."""
    name = path()
    return name != REFERENCE and _reads_six_bit(name)


@cache
def _reads_six_bit(name: str) -> bool:
    library, _ = _load()
    return library is not None and bool(library.sparse_bitnet_reads_six_bit(_PATH_IDS[name]))


def linear(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    layout: str,
    w_scale: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
) -> None:
    """One product into ``y``. All tensors are on the CPU, and dense in their last dimension.

    Args:
        x: ``[tokens, in]``: float32, bfloat16 or float16, quantized here unless the weight is of
            floats; or int8 with ``x_scale``.
        x_scale: float32 ``[tokens]``, contiguous; None with float activations.
        weight: uint8 or int8 in that layout, as of ``matmul/cpu.py``, or floats ``[out, in]``.
        w_scale: float32 ``[out]``, contiguous; None with a float weight.
        bias: float ``[out]``, contiguous, or None.
        y: ``[tokens, out]``, contiguous, of a float dtype as of ``x``.

    Raises:
        BackendError: if the path in use does not read the layout.
    """
    library, _ = _load()
    name = path()
    if library is None or name == REFERENCE or (layout == "six-bit" and not reads_six_bit()):
        raise BackendError(
            f"path {name!r} does not read a weight laid out as {layout!r}; prepare the weight "
            "after the path is chosen"
        )
    status = library.sparse_bitnet_linear(
        _arguments(
            x.data_ptr(),
            TYPES[x.dtype],
            x.stride(0),
            0 if x_scale is None else x_scale.data_ptr(),
            weight.data_ptr(),
            _LAYOUT_IDS[layout],
            weight.stride(0) * weight.element_size(),
            0 if w_scale is None else w_scale.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if bias is None else TYPES[bias.dtype],
            y.data_ptr(),
            TYPES[y.dtype],
            x.shape[0],
            x.shape[1],
            y.shape[-1],
            torch.get_num_threads(),
            _PATH_IDS[name],
        )
    )
    if status:
        raise MemoryError(f"no memory for the activations of {x.shape[0]} tokens")


def row_sums(weight: Tensor) -> Tensor:
    """Sum of magnitudes of each row, float64 ``[rows]``, of a contiguous float32 matrix."""
    sums = torch.empty(weight.shape[0], dtype=torch.float64)
    _ternarize(weight, sums.data_ptr(), 0, 0, 1, 1)
    return sums


def ternarize_rows(weight: Tensor, row_scale: Tensor, n: int, m: int) -> Tensor:
    """Masked ternary values, int8 ``[rows, columns]``, of a contiguous float32 matrix.

    Args:
        row_scale: γ of each row, float32 ``[rows]``, contiguous.
        n, m: of the pattern, ``m`` dividing the columns; equal for dense.
    """
    ternary = torch.empty(weight.shape, dtype=torch.int8)
    _ternarize(weight, 0, row_scale.data_ptr(), ternary.data_ptr(), n, m)
    return ternary


def _ternarize(weight: Tensor, sums: int, row_scale: int, ternary: int, n: int, m: int) -> None:
    library, _ = _load()
    assert library is not None  # a path other than the reference is in use
    where = (weight.data_ptr(), sums, row_scale, ternary, *weight.shape, n, m)
    library.sparse_bitnet_ternarize(
        _ternarize_arguments(*where, torch.get_num_threads(), _PATH_IDS[path()])
    )


def run_step(step: Any) -> None:
    """A ``Step`` of native.h, filled in; see ``layer.py``."""
    library, _ = _load()
    assert library is not None  # a path other than the reference is in use
    if library.sparse_bitnet_step(ctypes.byref(step)):
        raise MemoryError("no memory for a step's activations: let fewer sequences run at once")
