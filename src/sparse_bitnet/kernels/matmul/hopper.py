"""int8 tokens × two-bit ternary weights on Hopper: the launch of ``hopper.cu``, and the backend."""

from __future__ import annotations

import ctypes
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_bitnet.core.errors import BackendError
from sparse_bitnet.formats import sparse24
from sparse_bitnet.kernels.library import register
from sparse_bitnet.kernels.matmul import tiles
from sparse_bitnet.kernels.matmul.hopper_plan import Plan, Tile, cheapest
from sparse_bitnet.kernels.nvrtc import Kernel, check, has_nvrtc
from sparse_bitnet.kernels.platform import capability
from sparse_bitnet.kernels.registry import Backend, TernaryWeight, register_backend

CAPABILITY = (9, 0)
SPARSE = "sparse tiles"  # the layout of weights that keep 2:4
SOURCE = Path(__file__).with_name("hopper.cu")
OUTPUTS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.int32: 3}
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
LONGEST_ROW = 2**18
"""Sums carry a factor of 64 and reach 128 · 64 a column: from here on they would leave int32."""


@lru_cache(maxsize=4096)
def plan(tokens: int, out: int, columns: int, device_index: int, sparse: bool = False) -> Plan:
    """The cheapest way to multiply ``tokens`` by a weight ``[out, columns]``."""
    count = torch.cuda.get_device_properties(device_index).multi_processor_count

    def fits(tile: Tile, splits: int, tiles_: int) -> bool:
        return tiles_ <= _clusters(tile, splits, device_index)

    return cheapest(tokens, out, columns, count, fits, sparse)


@cache
def _clusters(tile: Tile, splits: int, device_index: int) -> int:
    """Tiles of ``few`` that run at the same time, each a cluster of ``splits`` blocks."""
    with torch.cuda.device(device_index):
        return kernel(tile, OUTPUTS[torch.bfloat16]).resident_clusters(splits)


class Arguments(ctypes.Structure):
    """``struct Arguments`` of ``hopper.cu``."""

    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("w_scale", ctypes.c_void_p),
        ("x_scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("flags", ctypes.c_void_p),
        ("out", ctypes.c_int),
        ("tokens", ctypes.c_int),
        ("k_blocks", ctypes.c_int),
        ("row_blocks", ctypes.c_int),
        ("splits", ctypes.c_int),
        ("row_tiles", ctypes.c_int),
        ("tiles", ctypes.c_int),
        ("cut_tiles", ctypes.c_int),
        ("bias_kind", ctypes.c_int),
        ("dependent", ctypes.c_int),
    ]


@cache
def kernel(tile: Tile, output: int, sparse: bool = False) -> Kernel:
    """The tile's kernel for a result of ``OUTPUTS``, compiled at its first launch."""
    source = _wgmma(tile.tokens, sparse) + SOURCE.read_text(encoding="utf-8")
    macros = tile.macros(output, sparse)
    return Kernel(source, macros, tile.kind, tile.threads, tile.shared_bytes, "sm_90a")


def _wgmma(tokens: int, sparse: bool) -> str:
    """The instruction of one step, which has as many operands as its N asks for."""
    count = tokens // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+r"(d[{i}])' for i in range(count))
    a = ", ".join(f"%{count + i}" for i in range(4))
    name = (
        f"wgmma.mma_async{'.sp' if sparse else ''}.sync.aligned.m64n{tokens}k{64 if sparse else 32}"
    )
    lanes = f"%{count + 5}, 0, " if sparse else ""
    return (
        f"__device__ __forceinline__ void wgmma(int (&d)[{count}], unsigned a0, unsigned a1, "
        "unsigned a2, unsigned a3, unsigned long long b, unsigned lanes) {\n"
        f'  asm volatile("{name}.s32.s8.s8 '
        f'{{{sums}}}, {{{a}}}, %{count + 4}, {lanes}1;" : {outputs} '
        ': "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(lanes));\n}\n'
    )


@lru_cache(maxsize=8192)
def _tensor_map(
    address: int, size: int, columns: int, rows: int, pitch: int, box_columns: int, box_rows: int
) -> Any:
    """What the copy engine has to know of ``[rows, columns]``: boxes of 128 bytes by ``box_rows``.

    It holds an address and a shape, nothing of the contents, so it may be remembered.
    """
    from cuda.bindings import driver

    kinds = driver.CUtensorMapDataType
    dtype = {1: kinds.CU_TENSOR_MAP_DATA_TYPE_UINT8, 2: kinds.CU_TENSOR_MAP_DATA_TYPE_UINT16}
    wide, narrow = driver.cuuint64_t, driver.cuuint32_t
    return check(
        driver.cuTensorMapEncodeTiled(
            dtype[size],
            2,
            address,
            [wide(columns), wide(rows)],
            [wide(pitch)],
            [narrow(box_columns), narrow(box_rows)],
            [narrow(1), narrow(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


def matmul(
    x_q: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    residual: Tensor | None = None,
    sparse: bool = False,
    how: Plan | None = None,
    dependent: bool = True,
) -> Tensor:
    """Y = (Xq @ Tᵀ) · x_scale · w_scale + bias [+ residual]; int32 gives the bare sums.

    Args:
        x_q: int8 ``[tokens, in]``; rows may be strided.
        x_scale: float32 ``[tokens]``.
        packed: uint8 of ``tiles.pack``, of a weight ``[out, in]``.
        w_scale: float32 ``[out]``.
        bias: ``[out]``, bfloat16, float16 or float32.
        out_dtype: bfloat16, float16, float32 or int32.
        residual: ``[tokens, out]`` of ``out_dtype``, added to Y once Y has been rounded.
        sparse: ``packed`` is stored for wgmma.sp.
        how: instead of :func:`plan`'s.
        dependent: may begin, and read weight, scales and bias, before the kernel ahead has ended;
            not where that one writes them.

    Returns:
        ``[tokens, out]``.

    Raises:
        BackendError: if rows are empty, or too long for exact sums.
    """
    tokens, columns = x_q.shape
    out = w_scale.shape[0]
    row_blocks, k_blocks, _ = packed.shape
    if not 0 < columns < LONGEST_ROW:
        raise BackendError(
            f"two-bit product: {columns} input features; it takes 1 to {LONGEST_ROW - 1}, whose "
            "sums fit int32"
        )
    y = torch.empty((tokens, out), dtype=out_dtype, device=x_q.device)
    if y.numel() == 0:
        return y
    how = how or plan(tokens, out, columns, x_q.device.index, sparse)
    tile = how.tile
    if residual is not None and tile.kind == "many":
        y = matmul(x_q, x_scale, packed, w_scale, bias, out_dtype, None, sparse, how, dependent)
        return y.add_(residual)
    x_q = _aligned(x_q)
    values = Arguments()
    values.weight, values.w_scale = packed.data_ptr(), w_scale.data_ptr()
    values.x_scale, values.y = x_scale.data_ptr(), y.data_ptr()
    if bias is not None:
        values.bias, values.bias_kind = bias.data_ptr(), OUTPUTS[bias.dtype]
    if residual is not None:
        values.residual = residual.data_ptr()
    values.out, values.tokens, values.splits = out, tokens, how.splits
    values.k_blocks, values.row_blocks, values.dependent = k_blocks, row_blocks, int(dependent)
    x_map = _tensor_map(
        x_q.data_ptr(), 1, x_q.shape[1], tokens, x_q.stride(0), tiles.COLUMNS, tile.tokens
    )
    addresses = [ctypes.addressof(values), x_map.getPtr()]
    row_tiles = -(-row_blocks // tile.warpgroups)
    count = row_tiles * -(-tokens // tile.tokens)
    code = kernel(tile, OUTPUTS[out_dtype], sparse)
    if tile.kind == "few":
        code.launch(count * how.splits, addresses, how.splits, dependent)
        return y
    values.row_tiles, values.tiles = row_tiles, count
    slots = torch.cuda.get_device_properties(x_q.device).multi_processor_count
    ctas = min(slots, count * k_blocks if how.cut_waves else count)
    waves, rest = divmod(count, ctas)
    if rest and how.cut_waves:
        values.cut_tiles = count - max(0, waves - how.cut_waves + 1) * ctas
        area = tile.rows * tile.tokens
        sums = torch.empty(ctas * area, dtype=torch.int32, device=y.device)
        flags = torch.zeros(ctas * tile.warpgroups, dtype=torch.int32, device=y.device)
        values.sums, values.flags = sums.data_ptr(), flags.data_ptr()
    y_map = x_map  # a placeholder where the copy engine cannot store the result
    if y.element_size() == 2 and out % 8 == 0:
        y_map = _tensor_map(y.data_ptr(), 2, out, tokens, 2 * out, tiles.ROWS, tile.tokens)
    code.launch(ctas, [*addresses, y_map.getPtr()], dependent=dependent)
    return y


def readable(bias: Tensor | None) -> Tensor | None:
    """A bias as the kernels read it: contiguous, of 16 or 32 bits."""
    if bias is None or (bias.dtype in FLOATS and bias.is_contiguous()):
        return bias
    return bias.float().contiguous()


def _aligned(x_q: Tensor) -> Tensor:
    """Rows as the copy engine reads them: they begin at multiples of 16 bytes."""
    if x_q.stride(1) == 1 and x_q.stride(0) % 16 == 0 and x_q.data_ptr() % 16 == 0:
        return x_q
    return F.pad(x_q, (0, -x_q.shape[1] % 16)).contiguous()


def _matmul(
    x_q: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    residual: Tensor | None,
    sparse: bool,
) -> Tensor:
    rows = x_q.reshape(-1, x_q.shape[-1])
    own_bias, bias = bias, readable(bias)  # a copy would be written by the kernel ahead
    if residual is not None:
        residual = residual.reshape(-1, w_scale.shape[0]).contiguous()
    x_scale = x_scale.reshape(-1).contiguous()
    y = matmul(
        rows,
        x_scale,
        packed,
        w_scale,
        bias,
        out_dtype,
        residual,
        sparse,
        dependent=bias is own_bias,
    )
    return y.view(*x_q.shape[:-1], w_scale.shape[0])


def _fake(
    x_q: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    residual: Tensor | None,
    sparse: bool,
) -> Tensor:
    return x_q.new_empty((*x_q.shape[:-1], w_scale.shape[0]), dtype=out_dtype)


register(
    "hopper_matmul(Tensor x_q, Tensor x_scale, Tensor packed, Tensor w_scale, Tensor? bias, "
    "ScalarType out_dtype, Tensor? residual, bool sparse) -> Tensor",
    _matmul,
    _fake,
)


class Hopper(Backend):
    """Two bits in the order of wgmma's fragments; of wgmma.sp's where a weight keeps 2:4."""

    name = "hopper"
    rank = 0

    def serves(self, device: torch.device) -> bool:
        return device.type == "cuda" and capability(device.index) == CAPABILITY and has_nvrtc()

    def reason(self, device: torch.device) -> str:
        return "Hopper's tensor cores read two-bit weights at every token count"

    def pack(self, ternary: Tensor, stored: Tensor | None) -> tuple[Tensor, str]:
        sparse = sparse24.fits(ternary)
        return tiles.pack(ternary, sparse), SPARSE if sparse else "tiles"

    def unpack(self, weight: TernaryWeight) -> Tensor:
        sparse = weight.layout == SPARSE
        return tiles.unpack(weight.packed, weight.out_features, weight.in_features, sparse)

    def multiply(
        self,
        x_q: Tensor,
        x_scale: Tensor,
        weight: TernaryWeight,
        bias: Tensor | None,
        out_dtype: torch.dtype,
        residual: Tensor | None,
    ) -> Tensor:
        y: Tensor = torch.ops.sparse_bitnet.hopper_matmul(
            x_q,
            x_scale,
            weight.packed,
            weight.w_scale,
            bias,
            out_dtype,
            residual,
            weight.layout == SPARSE,
        )
        return y


register_backend(Hopper())
