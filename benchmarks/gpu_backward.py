"""The backward products of one layer on an NVIDIA GPU: python benchmarks/gpu_backward.py

From dY in bf16 and what the forward kept (int8 activations and their scales, int8 T, γ) to dX and
a float32 dW. ``bf16`` is the same from bf16 activations and a bf16 weight, which is what a plain
layer keeps; ``compiled`` is what the package runs inside ``torch.compile``: int8 dequantized by
fused elementwise kernels, cuBLAS products; ``triton`` reads int8 tiles and converts in registers,
which spares those passes; ``fp8`` is the package's option. The rows below take the fp8 path apart;
"turned" with numbers is the same with another tile: rows × columns × warps.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_common import interleaved, report, summary
from sparse_bitnet import console
from sparse_bitnet.core import quantize_int8
from sparse_bitnet.kernels.backward import fp8, gradients, triton_fp8

LAYERS = {"3B gate": (11008, 2048), "3B down": (2048, 11008), "3B o": (2048, 2048)}
TURNS = [
    triton_fp8.Tile(*tile)
    for tile in ((128, 128, 8), (256, 64, 4), (256, 128, 8), (128, 64, 4), (64, 128, 4))
]
TILES = [
    triton.Config({"BM": m, "BN": n, "BK": k}, num_warps=warps, num_stages=stages)
    for m, n, k, warps, stages in (
        (128, 256, 64, 8, 3),
        (128, 256, 64, 8, 4),
        (256, 128, 64, 8, 3),
        (128, 128, 64, 4, 4),
        (128, 128, 128, 8, 3),
    )
]


@triton.autotune(TILES, key=["rows", "columns", "inner"])
@triton.jit
def _mixed_kernel(
    a_ptr,
    b_ptr,
    scale_ptr,
    c_ptr,
    rows,
    columns,
    inner,
    a_row,
    a_inner,
    SCALED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """C = A @ (scale · B), A bf16 of any strides, B int8 row-major, scale one for each row of B."""
    tiles_m, tiles_n = tl.cdiv(rows, BM), tl.cdiv(columns, BN)
    width = 8 * tiles_n
    program = tl.program_id(0)
    first = program // width * 8
    height = tl.minimum(tiles_m - first, 8)
    m = (first + program % width % height) * BM + tl.arange(0, BM)
    n = (program % width // height) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    a_at = a_ptr + (m % rows).to(tl.int64)[:, None] * a_row + k.to(tl.int64)[None, :] * a_inner
    b_at = b_ptr + k.to(tl.int64)[:, None] * columns + (n % columns)[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, inner, BK):
        a = tl.load(a_at)
        b = tl.load(b_at).to(tl.bfloat16)
        if SCALED:
            b = (b * tl.load(scale_ptr + start + k)[:, None]).to(tl.bfloat16)
        total = tl.dot(a, b, total)
        a_at += BK * a_inner
        b_at += BK * columns
    c_at = c_ptr + m.to(tl.int64)[:, None] * columns + n[None, :]
    inside = (m < rows)[:, None] & (n < columns)[None, :]
    tl.store(c_at, total.to(c_ptr.dtype.element_ty), mask=inside)


def mixed(a: Tensor, b: Tensor, scale: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    (rows, inner), columns = a.shape, b.shape[1]
    c = torch.empty(rows, columns, dtype=out_dtype, device=a.device)

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(rows, meta["BM"]) * triton.cdiv(columns, meta["BN"]),)

    _mixed_kernel[grid](
        a, b, scale, c, rows, columns, inner, a.stride(0), a.stride(1), SCALED=scale is not None
    )
    return c


def scaled_mm(a: Tensor, b: Tensor, out_dtype: torch.dtype, fast: bool, by_rows: bool) -> Tensor:
    """e4m3 [m, k] and [n, k]; scales of ones, whole or a row each."""
    shapes = ((a.shape[0], 1), (1, b.shape[0])) if by_rows else ((), ())
    scale_a, scale_b = (torch.ones(shape, device=a.device) for shape in shapes)
    return torch._scaled_mm(a, b.t(), scale_a, scale_b, out_dtype=out_dtype, use_fast_accum=fast)


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours.float() - exact.float()).norm() / exact.float().norm())


def measure(name: str, tokens: int, repeats: int) -> dict[str, Any]:
    out, columns = LAYERS[name]
    torch.manual_seed(0)
    dy = (torch.randn(tokens, out, device="cuda") * torch.rand(tokens, 1, device="cuda")).bfloat16()
    x_q, x_scale = quantize_int8(torch.randn(tokens, columns, device="cuda"))
    ternary = torch.randint(-1, 2, (out, columns), dtype=torch.int8, device="cuda")
    w_scale = torch.full((out,), 0.02, device="cuda")
    x, w = (x_q * x_scale).bfloat16(), (ternary * 0.02).bfloat16()
    one = torch.full((), 0.02, device="cuda")
    compiled = torch.compile(gradients)

    def kept(use_fp8: bool) -> tuple[Tensor | None, Tensor | None]:
        return compiled(dy, x_q, x_scale, ternary, w_scale, one_scale=True, use_fp8=use_fp8)

    def by_triton() -> tuple[Tensor, Tensor]:
        dx = mixed(dy, ternary, None, torch.bfloat16).mul_(one)
        return dx, mixed(dy.t(), x_q, x_scale, torch.float32)

    calls: dict[str, Callable[[], Any]] = {
        "bf16": lambda: (dy @ w, torch.mm(dy.t(), x, out_dtype=torch.float32)),
        "bf16, dW rounded": lambda: (dy @ w, (dy.t() @ x).float()),
        "compiled": partial(kept, False),
        "triton": by_triton,
        "fp8": partial(kept, True),
    }
    errors = {}
    failed = {}
    exact = calls["bf16"]()
    for path, call in list(calls.items()):
        try:
            ours = call()
            errors[path] = [relative(a, b) for a, b in zip(ours, exact, strict=True)]
        except Exception as error:
            failed[path] = f"{type(error).__name__}: {error}"[:300]
            del calls[path]
    values, scale = fp8.rows(dy, None)
    factor = torch.exp2(-torch.randint(0, 4, scale.shape, device="cuda").float())
    t8, dy8, x8 = (
        fp8._transposed(ternary, None),
        fp8._transposed(values, factor),
        fp8._transposed(x_q, 1 + factor / 2),
    )
    half, full = torch.bfloat16, torch.float32
    parts: dict[str, Callable[[], Any]] = {
        "dY rows": lambda: fp8.rows(dy, None),
        "dY turned": lambda: fp8._transposed(values, factor),
        "X turned": lambda: fp8._transposed(x_q, 1 + factor / 2),
        "T turned": lambda: fp8._transposed(ternary, None),
        **{
            f"{what} turned {'×'.join(map(str, tile))}": partial(
                triton_fp8.transposed, operand, given, tile
            )
            for tile in TURNS
            for what, operand, given in (("dY", values, factor), ("X", x_q, 1 + factor / 2))
        },
        "dX fast": partial(scaled_mm, values, t8, half, True, False),
        "dX precise": partial(scaled_mm, values, t8, half, False, False),
        "dX fast, row-wise": partial(scaled_mm, values, t8, half, True, True),
        "dW fast": partial(scaled_mm, dy8, x8, full, True, False),
        "dW precise": partial(scaled_mm, dy8, x8, full, False, False),
        "dW fast, bf16": partial(scaled_mm, dy8, x8, half, True, False),
        "dW precise, bf16": partial(scaled_mm, dy8, x8, half, False, False),
        "dW precise, row-wise, bf16": partial(scaled_mm, dy8, x8, half, False, True),
    }
    sums = dy8.float() @ x8.float().t()
    for path, call in list(parts.items()):
        try:
            ours = call()
            if path.startswith("dW"):
                errors[path] = [relative(ours, sums)]
        except Exception as error:
            failed[path] = f"{type(error).__name__}: {error}"[:300]
            del parts[path]
    del sums
    times = interleaved({path: [call] for path, call in (calls | parts).items()}, repeats)
    medians = {path: statistics.median(t) for path, t in times.items()}
    console.out.print(f"{name}, {tokens} tokens", markup=False)
    for path, took in medians.items():
        label = f"  ({medians['bf16'] / took:.2f}×)" if path in calls else ""
        off = " ".join(f"{e:.1e}" for e in errors.get(path, []))
        console.out.print(f"  {path:26} {took:8.1f} µs{label}  {off}", markup=False)
    for path, why in failed.items():
        console.out.print(f"  {path:26} {why}", markup=False)
    return {
        "layer": name,
        "tokens": tokens,
        "microseconds": {path: summary(t) for path, t in times.items()},
        "over_bf16": {path: medians["bf16"] / medians[path] for path in calls},
        "relative_errors": errors,
        "failed": failed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", nargs="+", default=[*LAYERS], choices=[*LAYERS])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    options = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.automatic_dynamic_shapes = False
    rows: list[dict[str, Any]] = []
    for name in options.layers:
        rows.append(measure(name, options.tokens, options.repeats))
        report("backward", rows, options.out)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
