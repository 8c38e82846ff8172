"""Tiles of the Hopper product, what they cost, and which serves a shape.

A product is cut into tiles of rows × tokens. Which shape of tile is best follows from how evenly
the tiles fill the GPU and what a step of each costs, so it is computed, not measured:
:data:`TILES` holds each shape's costs, fitted once to measurements on an H200
(``benchmarks/gpu_tiles.py``), and :func:`cheapest` takes the least.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sparse_bitnet.kernels.matmul import tiles

SPLITS = (1, 2, 4, 8)
CUT_MICROSECONDS = 5.0
"""What it costs to cut the last waves of ``many`` along K: idle time below this stays idle."""
SPARSE_STEP = 0.65
"""A step of wgmma.sp over one of wgmma: shared memory serves it no faster, so it is not a half."""
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

    def macros(self, output: int, sparse: bool) -> dict[str, int]:
        return {
            self.kind.upper(): 1,
            "SPARSE": int(sparse),
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


def cheapest(
    tokens: int,
    out: int,
    columns: int,
    multiprocessors: int,
    fits: Callable[[Tile, int, int], bool],
    sparse: bool = False,
) -> Plan:
    """The plan of the least :func:`estimate`.

    Args:
        multiprocessors: of the GPU.
        fits: whether so many tiles of ``few``, cut into so many slices, run at the same time.
        sparse: the weight is stored for wgmma.sp.
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
            time = estimate(tile, splits, tokens, out, columns, multiprocessors, sparse)
            if best is None or time < best[0]:
                idle = -(-count // multiprocessors) - count / multiprocessors
                cut = tile.kind == "many" and idle * k_blocks * tile.costs[1] > CUT_MICROSECONDS
                best = time, Plan(tile, splits, cut_waves=2 if cut else 0)
    assert best is not None  # the fallback serves everything
    return best[1]


def estimate(
    tile: Tile,
    splits: int,
    tokens: int,
    out: int,
    columns: int,
    multiprocessors: int,
    sparse: bool = False,
) -> float:
    """Microseconds of a product: a linear model whose weights were fitted for each tile.

    launch + load · (steps · step + results) + steps · latency + megabytes · memory
    + [splits > 1] · load · area · sum + (splits − 1) · slice, where the load is the most tiles that
    a multiprocessor computes, and a step one k block.
    """
    row_blocks, k_blocks = tiles.blocks(out, columns)
    count = -(-row_blocks // tile.warpgroups) * -(-tokens // tile.tokens) * splits
    launch, step, latency, results, memory, add, slices = tile.costs
    if sparse:
        step *= SPARSE_STEP
    load = -(-count // multiprocessors)
    steps = k_blocks / splits
    time = launch + load * (steps * step + results) + steps * latency
    time += out * columns / 4e6 * memory
    if splits > 1:
        time += load * tile.rows * min(tokens, tile.tokens) / 1e4 * add + (splits - 1) * slices
    return time
