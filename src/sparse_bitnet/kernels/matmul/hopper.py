"""int8 tokens × two-bit ternary weights on Hopper: shapes of tiles, their choice, the launch.

``hopper.cu`` has the kernels and their reasons. A product is cut into tiles of rows × tokens. Which
shape is best follows from how evenly the tiles fill the GPU and what a step of each costs, so it is
computed, not measured: :data:`TILES` holds each shape's costs, fitted once to measurements on an
H200 (``benchmarks/gpu_matmul.py``), and :func:`plan` takes the cheapest.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_bitnet.core.errors import BackendError
from sparse_bitnet.kernels.library import register
from sparse_bitnet.kernels.matmul import tiles
from sparse_bitnet.kernels.nvrtc import Kernel, check, has_nvrtc
from sparse_bitnet.kernels.platform import capability
from sparse_bitnet.kernels.registry import Backend, TernaryWeight, register_backend

CAPABILITY = (9, 0)
SOURCE = Path(__file__).with_name("hopper.cu")
OUTPUTS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.int32: 3}
LONGEST_ROW = 2**18
"""Sums carry a factor of 64 and reach 128 · 64 a column: from here on they would leave int32."""
SPLITS = (1, 2, 4, 8)
CUT_MICROSECONDS = 5.0
"""What it costs to cut the last waves of ``many`` along K: idle time below this stays idle."""
WARPGROUP_REGISTERS = 65536 // 128


@dataclass(frozen=True)
class Tile:
    """A shape of tile, ``64 · warpgroups`` rows × ``tokens``, and what it costs.

    Attributes:
        kind: the kernel: ``few`` or ``many``.
        tokens, warpgroups, blocks, stages, ctas, ahead: macros of ``hopper.cu``.
        costs: microseconds: see :func:`estimate`.
    """

    kind: Literal["few", "many"]
    tokens: int
    warpgroups: int
    blocks: int
    stages: int
    ctas: int
    ahead: int
    costs: tuple[float, float, float, float, float, float, float]

    @property
    def rows(self) -> int:
        return tiles.ROWS * self.warpgroups

    @property
    def producers(self) -> int:
        """Threads: one warp; a warpgroup where registers have to be moved to the consumers."""
        return 128 if self.tokens >= 128 else 32

    @property
    def threads(self) -> int:
        return self.warpgroups * 128 + self.producers

    @property
    def registers(self) -> tuple[int, int]:
        """Of a consumer's and of a producer's thread, once they have been moved."""
        groups = self.warpgroups + 1
        share = WARPGROUP_REGISTERS // (groups * self.ctas) // 8 * 8
        producer = 32 if self.warpgroups > 2 or self.ctas > 1 else 40
        return min(240, (share * groups - producer) // self.warpgroups // 8 * 8), producer

    @property
    def shared_bytes(self) -> int:
        ring = self.stages * self.blocks * (self.warpgroups * tiles.BLOCK_BYTES + self.tokens * 128)
        if self.kind == "few":
            sums = self.tokens * (self.rows + 4) * 4
            scales = (self.tokens + 2 * self.rows) * 4
            return 1024 + max(ring, sums) + scales + 16 * self.stages
        results = self.warpgroups * (self.tokens * 128 + (self.tokens + 64) * 4)
        return 1024 + ring + results + 16 * self.stages

    def macros(self, output: int) -> dict[str, int]:
        return {
            self.kind.upper(): 1,
            "TOKENS": self.tokens,
            "WARPGROUPS": self.warpgroups,
            "BLOCKS": self.blocks,
            "STAGES": self.stages,
            "CTAS": self.ctas,
            "AHEAD": self.ahead,
            "PRODUCERS": self.producers,
            "CONSUMER_REGISTERS": self.registers[0],
            "PRODUCER_REGISTERS": self.registers[1],
            "OUTPUT": output,
        }


TILES = (
    Tile("few", 8, 1, 2, 6, 5, 99, (1.625, 0.035, 0.066, 0.0, 0.149, 5.62, 0.141)),
    Tile("few", 16, 1, 2, 5, 5, 99, (1.494, 0.044, 0.062, 0.0, 0.119, 3.426, 0.157)),
    Tile("few", 32, 1, 2, 3, 5, 99, (1.809, 0.044, 0.094, 0.0, 0.168, 2.194, 0.135)),
    Tile("few", 32, 2, 2, 4, 3, 2, (1.866, 0.095, 0.083, 0.0, 0.105, 1.433, 0.182)),
    Tile("few", 64, 1, 1, 7, 3, 99, (2.112, 0.062, 0.138, 0.0, 0.172, 1.531, 0.1)),
    Tile("few", 64, 2, 2, 4, 2, 99, (2.691, 0.132, 0.059, 0.0, 0.11, 0.902, 0.19)),
    Tile("few", 128, 2, 1, 9, 1, 3, (0.0, 0.308, 0.0, 4.322, 0.04, 0.545, 0.0)),
    Tile("few", 128, 3, 1, 9, 1, 3, (0.0, 0.447, 0.0, 4.757, 0.078, 0.393, 0.096)),
    Tile("many", 64, 5, 1, 9, 1, 4, (0.515, 0.57, 0.0, 1.646, 0.067, 0.0, 0.0)),
    Tile("many", 128, 2, 1, 8, 1, 99, (1.106, 0.315, 0.0, 1.556, 0.073, 0.0, 0.0)),
    Tile("many", 128, 3, 1, 7, 1, 3, (1.236, 0.427, 0.0, 1.949, 0.088, 0.0, 0.0)),
    Tile("many", 128, 4, 1, 6, 1, 99, (1.057, 0.565, 0.0, 2.736, 0.123, 0.0, 0.0)),
    Tile("many", 256, 2, 1, 4, 1, 2, (1.602, 0.571, 0.0, 3.228, 0.114, 0.0, 0.0)),
)
FALLBACK = next(tile for tile in TILES if tile.kind == "many")
"""Serves every shape, whatever of it is padding."""


@dataclass(frozen=True)
class Plan:
    """How one product is computed.

    Attributes:
        splits: slices of K of a tile in ``few``.
        cut_waves: in ``many``, how many of the last waves are cut along K between neighbours if
            they do not fill the GPU; 0 for none.
    """

    tile: Tile
    splits: int = 1
    cut_waves: int = 0


@lru_cache(maxsize=4096)
def plan(tokens: int, out: int, columns: int, device_index: int) -> Plan:
    """The cheapest way to multiply ``tokens`` by a weight ``[out, columns]``."""
    count = torch.cuda.get_device_properties(device_index).multi_processor_count

    def fits(tile: Tile, splits: int, tiles_: int) -> bool:
        return tiles_ <= _clusters(tile, splits, device_index)

    return cheapest(tokens, out, columns, count, fits)


def cheapest(
    tokens: int,
    out: int,
    columns: int,
    multiprocessors: int,
    fits: Callable[[Tile, int, int], bool],
) -> Plan:
    """The plan of the least :func:`estimate`.

    Args:
        multiprocessors: of the GPU.
        fits: whether so many tiles of ``few``, cut into so many slices, run at the same time.
    """
    row_blocks, k_blocks = tiles.blocks(out, columns)
    best: tuple[float, Plan] | None = None
    for tile in TILES:
        count = -(-row_blocks // tile.warpgroups) * -(-tokens // tile.tokens)
        if tile.tokens >= 2 * max(tokens, TILES[0].tokens) and tile is not FALLBACK:
            continue  # half of it would be padding: a narrower one does the same
        for splits in SPLITS if tile.kind == "few" else (1,):
            if tile.kind == "few" and (
                k_blocks < splits * tile.blocks or not fits(tile, splits, count)
            ):
                continue
            time = estimate(tile, splits, tokens, out, columns, multiprocessors)
            if best is None or time < best[0]:
                idle = -(-count // multiprocessors) - count / multiprocessors
                cut = tile.kind == "many" and idle * k_blocks * tile.costs[1] > CUT_MICROSECONDS
                best = time, Plan(tile, splits, cut_waves=2 if cut else 0)
    assert best is not None  # the fallback serves everything
    return best[1]


def estimate(
    tile: Tile, splits: int, tokens: int, out: int, columns: int, multiprocessors: int
) -> float:
    """Microseconds of a product: a linear model whose weights were fitted for each tile.

    launch + load · (steps · step + results) + steps · latency + megabytes · memory
    + [splits > 1] · load · area · sum + (splits − 1) · slice, where the load is the most tiles that
    a multiprocessor computes, and a step one k block.
    """
    row_blocks, k_blocks = tiles.blocks(out, columns)
    count = -(-row_blocks // tile.warpgroups) * -(-tokens // tile.tokens) * splits
    launch, step, latency, results, memory, add, slices = tile.costs
    load = -(-count // multiprocessors)
    steps = k_blocks / splits
    time = launch + load * (steps * step + results) + steps * latency
    time += out * columns / 4e6 * memory
    if splits > 1:
        time += load * tile.rows * min(tokens, tile.tokens) / 1e4 * add + (splits - 1) * slices
    return time


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
def kernel(tile: Tile, output: int) -> Kernel:
    """The tile's kernel for a result of ``OUTPUTS``, compiled at its first launch."""
    source = _wgmma(tile.tokens) + SOURCE.read_text(encoding="utf-8")
    macros = tile.macros(output)
    return Kernel(source, macros, tile.kind, tile.threads, tile.shared_bytes, "sm_90a")


def _wgmma(tokens: int) -> str:
    """The instruction of one k32 step, which has as many operands as its N asks for."""
    count = tokens // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+r"(d[{i}])' for i in range(count))
    a = ", ".join(f"%{count + i}" for i in range(4))
    return (
        f"__device__ __forceinline__ void wgmma(int (&d)[{count}], unsigned a0, unsigned a1, "
        "unsigned a2, unsigned a3, unsigned long long b) {\n"
        f'  asm volatile("wgmma.mma_async.sync.aligned.m64n{tokens}k32.s32.s8.s8 '
        f'{{{sums}}}, {{{a}}}, %{count + 4}, 1;" : {outputs} '
        ': "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));\n}\n'
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
    how: Plan | None = None,
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
        how: instead of :func:`plan`'s.

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
    how = how or plan(tokens, out, columns, x_q.device.index)
    tile = how.tile
    if residual is not None and tile.kind == "many":
        y = matmul(x_q, x_scale, packed, w_scale, bias, out_dtype, how=how)
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
    values.k_blocks, values.row_blocks, values.dependent = k_blocks, row_blocks, 1
    x_map = _tensor_map(
        x_q.data_ptr(), 1, x_q.shape[1], tokens, x_q.stride(0), tiles.COLUMNS, tile.tokens
    )
    addresses = [ctypes.addressof(values), x_map.getPtr()]
    row_tiles = -(-row_blocks // tile.warpgroups)
    count = row_tiles * -(-tokens // tile.tokens)
    code = kernel(tile, OUTPUTS[out_dtype])
    if tile.kind == "few":
        code.launch(count * how.splits, addresses, cluster=how.splits)
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
    code.launch(ctas, [*addresses, y_map.getPtr()])
    return y


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
) -> Tensor:
    rows = x_q.reshape(-1, x_q.shape[-1])
    if bias is not None and not bias.is_contiguous():
        # The kernel reads it before the kernel ahead has ended, which its copy must not be.
        bias = bias.contiguous()
        rows = rows.clone()
    if residual is not None:
        residual = residual.reshape(-1, w_scale.shape[0]).contiguous()
    y = matmul(rows, x_scale.reshape(-1).contiguous(), packed, w_scale, bias, out_dtype, residual)
    return y.view(*x_q.shape[:-1], w_scale.shape[0])


def _fake(
    x_q: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    residual: Tensor | None,
) -> Tensor:
    return x_q.new_empty((*x_q.shape[:-1], w_scale.shape[0]), dtype=out_dtype)


register(
    "hopper_matmul(Tensor x_q, Tensor x_scale, Tensor packed, Tensor w_scale, Tensor? bias, "
    "ScalarType out_dtype, Tensor? residual) -> Tensor",
    _matmul,
    _fake,
)


class Hopper(Backend):
    """Two bits in the order of wgmma's fragments."""

    name = "hopper"
    rank = 0

    def serves(self, device: torch.device) -> bool:
        return device.type == "cuda" and capability(device.index) == CAPABILITY and has_nvrtc()

    def reason(self, device: torch.device) -> str:
        return "Hopper's tensor cores read two-bit weights at every token count"

    def pack(self, ternary: Tensor, stored: Tensor | None) -> tuple[Tensor, str]:
        return tiles.pack(ternary), "tiles"

    def unpack(self, weight: TernaryWeight) -> Tensor:
        return tiles.unpack(weight.packed, weight.out_features, weight.in_features)

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
            x_q, x_scale, weight.packed, weight.w_scale, bias, out_dtype, residual
        )
        return y


register_backend(Hopper())
