"""Tiles of the Hopper product: they compile without a GPU, and a plan fits what it is for."""

import ctypes
import re

import pytest
import torch

from sparse_bitnet.kernels import matmul, nvrtc
from sparse_bitnet.kernels.matmul import hopper, tiles
from sparse_bitnet.kernels.matmul.hopper_plan import FALLBACK, TILES, cheapest

MULTIPROCESSORS = 132
SHARED_BYTES = 227 * 1024  # of a block; a multiprocessor has 228 KB, and each block takes 1 KB
OTHERS = (torch.float16, torch.float32, torch.int32)
REGISTERS = 65536 // 4  # of each quarter of a multiprocessor


def roomy(tile, splits, count):
    """What an H200 holds, clusters cut off at the borders of its processing clusters ignored."""
    return count * splits <= MULTIPROCESSORS * tile.ctas


def name(tile):
    return f"{tile.kind}-{tile.rows}x{tile.tokens}"


@pytest.mark.skipif(not nvrtc.has_nvrtc(), reason="needs NVRTC (nvidia-cuda-nvrtc, cuda-bindings)")
@pytest.mark.parametrize(
    ("tile", "sparse", "dtype"),
    [
        *((tile, sparse, torch.bfloat16) for tile in TILES for sparse in (False, True)),
        # What writes a result does not depend on the tile: one of each kind.
        *((tile, False, dtype) for tile in (TILES[0], FALLBACK) for dtype in OTHERS),
    ],
    ids=lambda value: name(value) if hasattr(value, "kind") else str(value),
)
def test_every_tile_compiles(tile, sparse, dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSE_BITNET_CACHE", str(tmp_path))
    kernel = hopper.kernel(tile, hopper.OUTPUTS[dtype], sparse)
    code = nvrtc.compile_source(kernel.source, kernel.macros, kernel.architecture)
    assert code[:4] == b"\x7fELF"
    (kept,) = tmp_path.glob("*.cubin")
    assert kept.read_bytes() == code
    kept.write_bytes(b"kept")  # the second time it is read, not compiled
    again = nvrtc.compile_source(kernel.source, kernel.macros, kernel.architecture)
    assert again == b"kept"


@pytest.mark.skipif(not nvrtc.has_nvrtc(), reason="needs NVRTC (nvidia-cuda-nvrtc, cuda-bindings)")
def test_a_source_that_does_not_compile_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSE_BITNET_CACHE", str(tmp_path))
    with pytest.raises(nvrtc.BackendError, match=r"NVRTC.*undefined"):
        nvrtc.compile_source("__global__ void k() { nothing(); }", {}, "sm_90a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tile", TILES, ids=name)
def test_tiles_fit_a_multiprocessor(tile):
    assert tile.shared_bytes <= SHARED_BYTES
    assert tile.ctas * (tile.shared_bytes + 1024) <= SHARED_BYTES + 1024
    warps = -(-tile.ctas * tile.threads // 128)  # on each quarter
    if tile.producers == 128:
        consumer, producer = tile.registers
        assert tile.ctas * 32 * (tile.warpgroups * consumer + producer) <= REGISTERS
        assert consumer >= tile.tokens // 2 + 40  # sums, fragments and addresses
    else:
        assert REGISTERS // 32 // warps >= tile.tokens // 2 + 30
    assert tile.warpgroups <= 32 and tile.blocks <= 32  # one lane of the producer asks for each
    assert tile.stages >= 2


def test_arguments_are_laid_out_as_in_the_source():
    source = hopper.SOURCE.read_text(encoding="utf-8")
    body = re.search(r"struct Arguments \{(.*?)\n\};", source, re.DOTALL)[1]
    body = re.sub(r"//.*", "", body)
    declared = re.findall(r"[*\s](\w+)\s*[,;]", body)
    assert declared == [field for field, _ in hopper.Arguments._fields_]
    assert ctypes.sizeof(hopper.Arguments) == 8 * 8 + 10 * 4


SHAPES = [(37888, 3584), (3584, 18944), (4608, 3584), (1536, 8960), (576, 1536), (1, 1), (65, 129)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_plan_serves_what_it_is_asked_for(shape):
    for tokens in (1, 2, 7, 16, 33, 64, 200, 256, 1000, 4096, 65536):
        serves(tokens, shape, cheapest(tokens, *shape, MULTIPROCESSORS, roomy))


def serves(tokens, shape, plan):
    k_blocks = -(-shape[1] // 128)
    row_tiles, token_tiles = -(-shape[0] // plan.tile.rows), -(-tokens // plan.tile.tokens)
    assert plan.splits * plan.tile.blocks <= max(k_blocks, plan.tile.blocks)
    if plan.tile.kind == "few":
        assert roomy(plan.tile, plan.splits, row_tiles * token_tiles)
        assert not plan.cut_waves
    else:
        assert plan.splits == 1


def test_plans_of_an_h200():
    """The choices that the measurements of its table ask for."""

    def plan(tokens, out, columns):
        return cheapest(tokens, out, columns, MULTIPROCESSORS, roomy)

    assert plan(1, 37888, 3584).tile.tokens == 8
    assert plan(16, 37888, 3584).tile.tokens == 16
    assert plan(16, 3584, 18944).splits > 1  # too few rows to fill the GPU
    assert plan(64, 37888, 3584).tile.rows == 320  # 592 row blocks: five for each multiprocessor
    assert plan(256, 37888, 3584).tile.rows == 192
    assert plan(4096, 37888, 3584).tile.kind == "many"


def test_a_result_that_fits_no_wave_is_cut_along_k():
    plan = cheapest(4096, 3584, 18944, MULTIPROCESSORS, roomy)
    assert plan.cut_waves


def test_a_product_waits_for_the_kernel_that_packs_its_weight(monkeypatch):
    """It reads weights before the kernel ahead has ended, unless that one writes them."""
    pytest.importorskip("triton")
    asked = []

    def product(x_q, *_, **options):
        asked.append(options)
        return torch.zeros(x_q.shape[0], 8)

    monkeypatch.setattr(matmul, "_takes_tiles", lambda rows, weight: True)
    monkeypatch.setattr(
        "sparse_bitnet.kernels.matmul.triton_tiles.pack", lambda rows, columns: rows
    )
    monkeypatch.setattr(hopper, "matmul", product)
    x, scale = torch.zeros(4, 16, dtype=torch.int8), torch.ones(4, 1)
    weight, bias = torch.zeros(8, 16, dtype=torch.int8), torch.zeros(8)
    matmul._dense(x, scale, weight, torch.ones(8), None, torch.float32)
    packed = tiles.pack(weight)
    for given in (None, bias, bias.double()):
        hopper._matmul(x, scale, packed, torch.ones(8), given, torch.float32, None, False)
    assert [options["dependent"] for options in asked] == [False, True, True, False]
