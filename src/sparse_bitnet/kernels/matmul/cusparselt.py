"""int8 × 2:4 ternary on sparse tensor cores, through NVIDIA's cuSPARSELt called directly.

PyTorch's own wrapper builds handle, descriptors and plan anew at every call, 300 µs and more of
host time. Here they are made once a shape, and those of the last shapes kept; a call is one ctypes
call. A plan is destroyed with its last user, as PyTorch's wrapper does right after every launch.

The weight is the structured operand and Y is its transpose's result, so the library's vector of
factors runs along output features: acc · γ_row is rounded to bf16 as it leaves. It has no second
vector, so the token scale is applied afterwards: by :func:`finish`, or by whatever kernel reads Y
next (inside ``torch.compile`` the multiplication is a plain operation, which fuses there). Scaling
along tokens by making X the first operand was tried: the factors still follow the weight.

The library is the one that PyTorch's CUDA wheels bring and have already loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_bitnet.core.errors import BackendError, WeightError
from sparse_bitnet.formats import sparse24
from sparse_bitnet.kernels import autotune
from sparse_bitnet.kernels.recent import Recent

OPAQUE_BYTES = 4096  # the library's structures hold 512 in 0.8; room for newer ones
OLDEST_VERSION = 800  # the enumeration values below are those of 0.8
COLUMN_MAJOR, ROW_MAJOR = 1, 2
AS_IS, TRANSPOSED = 0, 1
COMPUTE_INT32 = 0
ALPHA_VECTOR_SCALING = 5
CONFIG_ID, CONFIG_MAX_ID = 0, 1
INT8, BFLOAT16 = 3, 14  # cudaDataType
DESTROY_MATRIX, DESTROY_PLAN = "cusparseLtMatDescriptorDestroy", "cusparseLtMatmulPlanDestroy"
ALIGNMENT = 16
TOKEN_MULTIPLE = 16
FEATURE_MULTIPLE = 32
MOST_PLANS = 128
"""Of the last shapes used: 32 token counts of the four weights of a decoder, say."""


def _opaque() -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(OPAQUE_BYTES)


@cache
def _library() -> ctypes.CDLL | None:
    for name in ("libcusparseLt.so.0", "libcusparseLt.so"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.cusparseLtGetErrorString.restype = ctypes.c_char_p
        pointer = ctypes.c_void_p
        library.cusparseLtMatmul.argtypes = [pointer] * 10 + [ctypes.c_int32]
        return library
    return None


def _call(name: str, *arguments: object) -> None:
    library = _library()
    if library is None:
        raise BackendError(
            "cuSPARSELt is not installed; install a CUDA build of PyTorch, which brings it, or "
            "keep to the dense layout"
        )
    status = getattr(library, name)(*arguments)
    if status:
        _fail(name, status)


def _fail(name: str, status: int) -> None:
    library = _library()
    reason = library.cusparseLtGetErrorString(status).decode() if library else str(status)
    raise BackendError(f"{name} failed: {reason}; keep to the dense layout for this shape")


@cache
def _handle(device_index: int) -> ctypes.Array[ctypes.c_char]:
    handle = _opaque()
    with torch.cuda.device(device_index):
        torch.cuda.synchronize()  # the device's context must exist
        _call("cusparseLtInit", handle)
    return handle


@cache
def version(device_index: int) -> int:
    """The library's version, 800 for 0.8.0; 0 where it cannot be loaded or used."""
    if _library() is None:
        return 0
    value = ctypes.c_int(0)
    try:
        _call("cusparseLtGetVersion", _handle(device_index), ctypes.byref(value))
    except BackendError:
        return 0
    return value.value


def serves(device: torch.device, out_features: int, in_features: int) -> bool:
    """Whether the library is there and takes a 2:4 weight of this shape."""
    if device.type != "cuda" or out_features % FEATURE_MULTIPLE or in_features % FEATURE_MULTIPLE:
        return False
    return version(_index(device)) >= OLDEST_VERSION


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _dense(handle: object, rows: int, columns: int, kind: int, order: int) -> object:
    descriptor = _opaque()
    leading = columns if order == ROW_MAJOR else rows
    _call(
        "cusparseLtDenseDescriptorInit",
        handle,
        descriptor,
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        ctypes.c_int64(leading),
        ctypes.c_uint32(ALIGNMENT),
        kind,
        order,
    )
    return descriptor


def _structured(handle: object, rows: int, columns: int) -> object:
    descriptor = _opaque()
    _call(
        "cusparseLtStructuredDescriptorInit",
        handle,
        descriptor,
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        ctypes.c_int64(columns),
        ctypes.c_uint32(ALIGNMENT),
        INT8,
        ROW_MAJOR,
        0,  # 50 % sparsity
    )
    return descriptor


def _destroy(*made: tuple[str, object]) -> None:
    """Give structures back to the library: pairs of its function and the structure.

    While a CUDA graph is captured they wait for the next call, for memory must not be freed then.
    """
    _ended.extend(made)
    library = _library()
    while _ended and library is not None and autotune.may_measure():
        with contextlib.suppress(IndexError):  # another thread was faster
            function, structure = _ended.popleft()
            getattr(library, function)(structure)  # nobody could help what it refuses


_ended: deque[tuple[str, object]] = deque()


def compress(ternary: Tensor) -> Tensor:
    """2:4 int8 ``[out, in]`` on CUDA → the library's own form, uint8, about 0.63 bytes a weight.

    Raises:
        WeightError: if any aligned four lanes hold more than two non-zeros.
        BackendError: if the library does not take the shape.
    """
    if not sparse24.fits(ternary):
        raise WeightError(
            f"2:4: the weight {tuple(ternary.shape)} has more than two non-zeros in four lanes; "
            "encode it as windows first, or keep it dense"
        )
    return compress_kept(ternary)


def compress_kept(ternary: Tensor) -> Tensor:
    """The same for a weight known to be 2:4, without looking: looking waits for the device."""
    with torch.cuda.device(ternary.device), contextlib.ExitStack() as made:
        handle = _handle(_index(ternary.device))
        descriptor = _structured(handle, *ternary.shape)
        made.callback(_destroy, (DESTROY_MATRIX, descriptor))
        size, scratch = ctypes.c_size_t(0), ctypes.c_size_t(0)
        _call(
            "cusparseLtSpMMACompressedSize2",
            handle,
            descriptor,
            ctypes.byref(size),
            ctypes.byref(scratch),
        )
        ternary = ternary.contiguous()
        compressed = torch.empty(size.value, dtype=torch.uint8, device=ternary.device)
        buffer = torch.empty(scratch.value, dtype=torch.uint8, device=ternary.device)
        _call(
            "cusparseLtSpMMACompress2",
            handle,
            descriptor,
            1,
            AS_IS,
            ctypes.c_void_p(ternary.data_ptr()),
            ctypes.c_void_p(compressed.data_ptr()),
            ctypes.c_void_p(buffer.data_ptr()),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )
    return compressed


@dataclass(frozen=True, eq=False)
class _Plan:
    """One product, ready to run; ``keep`` holds what the library points into.

    Destroyed with the last reference. What it has launched, or what a CUDA graph has captured of
    it, goes on.
    """

    multiply: Callable[..., int]
    handle: object
    plan: object
    beta: object
    workspace_bytes: int
    algorithms: int
    keep: tuple[object, ...]


def _plan(device_index: int, tokens: int, out: int, inner: int, algorithm: int | None) -> _Plan:
    """A new plan by an algorithm's number, or by the library's own choice.

    Raises:
        BackendError: if the library has no such product.
    """
    handle = _handle(device_index)
    product, selection, plan = _opaque(), _opaque(), _opaque()
    with contextlib.ExitStack() as failing:
        matrices = []
        for make, *what in (
            (_structured, out, inner),
            (_dense, tokens, inner, INT8, ROW_MAJOR),
            (_dense, out, tokens, BFLOAT16, COLUMN_MAJOR),
        ):
            matrices.append(make(handle, *what))
            failing.callback(_destroy, (DESTROY_MATRIX, matrices[-1]))
        weight, x, y = matrices
        operations = (AS_IS, TRANSPOSED)
        _call(
            "cusparseLtMatmulDescriptorInit",
            handle,
            product,
            *operations,
            weight,
            x,
            y,
            y,
            COMPUTE_INT32,
        )
        _set("cusparseLtMatmulDescSetAttribute", handle, product, ALPHA_VECTOR_SCALING, 1)
        _call("cusparseLtMatmulAlgSelectionInit", handle, selection, product, 0)
        if algorithm is not None:
            _set("cusparseLtMatmulAlgSetAttribute", handle, selection, CONFIG_ID, algorithm)
        count = ctypes.c_int(0)
        _call(
            "cusparseLtMatmulAlgGetAttribute",
            handle,
            selection,
            CONFIG_MAX_ID,
            ctypes.byref(count),
            ctypes.c_size_t(4),
        )
        _call("cusparseLtMatmulPlanInit", handle, plan, product, selection)
        failing.callback(_destroy, (DESTROY_PLAN, plan))
        size = ctypes.c_size_t(0)
        _call("cusparseLtMatmulGetWorkspace", handle, plan, ctypes.byref(size))
        library = _library()
        assert library is not None  # the calls above went through it
        made = _Plan(
            multiply=library.cusparseLtMatmul,
            handle=handle,
            plan=plan,
            beta=ctypes.byref(ctypes.c_float(0.0)),
            # Rounded up, so that few sizes of workspace are kept whatever the token counts are.
            workspace_bytes=1 << (size.value - 1).bit_length() if size.value else 0,
            algorithms=count.value,
            keep=(*matrices, product, selection),
        )
        failing.pop_all()
    ends = [*((DESTROY_MATRIX, matrix) for matrix in matrices), (DESTROY_PLAN, plan)]
    weakref.finalize(made, _destroy, *ends).atexit = False  # the library may have gone by then
    return made


def _set(function: str, handle: object, target: object, attribute: int, value: int) -> None:
    number = ctypes.c_int(value)
    _call(function, handle, target, attribute, ctypes.byref(number), ctypes.c_size_t(4))


def _run(plan: _Plan, x_q: Tensor, compressed: Tensor, w_scale: Tensor, y: Tensor) -> None:
    # The stream's address without an object around it: a tenth of the host time.
    stream = torch._C._cuda_getCurrentRawStream(_index(y.device))
    key = (y.device, stream, plan.workspace_bytes)
    workspace = _workspaces.get(key)
    if workspace is None:
        workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=y.device)
        if autotune.may_measure():  # a captured graph keeps the memory of its own
            _workspaces[key] = workspace
    status = plan.multiply(
        plan.handle,
        plan.plan,
        w_scale.data_ptr(),
        compressed.data_ptr(),
        x_q.data_ptr(),
        plan.beta,
        y.data_ptr(),
        y.data_ptr(),
        workspace.data_ptr(),
        ctypes.byref(ctypes.c_void_p(stream)),
        1,
    )
    if status:
        _fail("cusparseLtMatmul", status)


def _chosen(x_q: Tensor, compressed: Tensor, w_scale: Tensor, y: Tensor) -> _Plan:
    """The plan of the algorithm remembered for this shape, else of the fastest of all.

    While a CUDA graph is captured nothing can be timed, and with SPARSE_BITNET_MEASURE=0 nothing
    is: the library's own choice serves.
    """
    index = _index(x_q.device)
    (tokens, inner), out = x_q.shape, y.shape[1]
    remembered = autotune.memory(index)
    key = f"cusparselt {version(index)} {autotune.bucket(tokens)}x{out}x{inner}"
    times = remembered.get(key)
    if times is None and autotune.may_measure_now():
        calls = {}
        for candidate in range(_plan(index, tokens, out, inner, None).algorithms):
            with contextlib.suppress(BackendError):  # not every algorithm takes every shape
                plan = _plan(index, tokens, out, inner, candidate)
                calls[str(candidate)] = [partial(_run, plan, x_q, compressed, w_scale, y)]
        times = {}
        for name, call in calls.items():
            with contextlib.suppress(BackendError):
                times[name] = autotune.microseconds(call)
        if times:
            remembered.put(key, autotune.under_load(calls, times))
            times = remembered.get(key)
    for name in times or {}:  # fastest first
        # Another token count of the bucket may be refused what this one was measured with.
        with contextlib.suppress(BackendError, ValueError):
            return _plan(index, tokens, out, inner, int(name))
    return _plan(index, tokens, out, inner, None)


_plans: Recent[tuple[int, int, int, int], _Plan] = Recent(MOST_PLANS)
_workspaces: dict[tuple[torch.device, int, int], Tensor] = {}
"""One a stream and size, a power of two: calls on one stream follow each other."""


def matmul(x_q: Tensor, compressed: Tensor, w_scale: Tensor) -> Tensor:
    """bf16(Xq @ Tᵀ · w_scale), the token scale still to come.

    Args:
        x_q: int8 ``[tokens, in]``, lifted if the weight is over windows.
        compressed: of :func:`compress`.
        w_scale: float32 ``[out]``.

    Returns:
        bf16 ``[tokens, out]``.
    """
    tokens, inner = x_q.shape
    out = w_scale.shape[0]
    missing = -tokens % TOKEN_MULTIPLE
    if missing:
        x_q = F.pad(x_q, (0, 0, 0, missing))
    x_q = x_q.contiguous()
    y = torch.empty((tokens + missing, out), dtype=torch.bfloat16, device=x_q.device)
    if tokens:
        key = (_index(x_q.device), tokens + missing, inner, out)
        plan = _plans.get(key)
        if plan is None:
            plan = _chosen(x_q, compressed, w_scale, y)
            if autotune.may_measure():
                _plans.put(key, plan)
        _run(plan, x_q, compressed, w_scale, y)
    return y[:tokens] if missing else y
