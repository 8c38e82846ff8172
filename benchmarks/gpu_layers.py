"""Linear layers on an NVIDIA GPU, everything included: python benchmarks/gpu_layers.py

Each path begins with bf16 activations and ends with bf16 results: quantization, lifting, product,
scales. Dense int8 and the sparse paths run what measurement chose; ``bf16`` is cuBLAS, ``int_mm``
is torch._int_mm between our quantization and compiled scaling, ``fp8`` is torch._scaled_mm with
row-wise scales after compiled quantization. Sparse paths appear twice: with a pass of their own for
the token scale, and (``deferred``) with the token scale left to the kernel that reads the result.

The rows named ``mlp`` are a whole gated MLP, gate and up fused, where nothing is left to anyone:
the token scale of gate_up goes into the kernel that multiplies, quantizes and lifts.

The file is written after every row. A row of few tokens takes up to ten seconds where its shape has
to be measured first; within three minutes for instance: --tokens 2 4 16 --models 7B --minutes 2.5
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_common import copies_beyond_cache, interleaved, summary, write
from sparse_bitnet import console
from sparse_bitnet.core import Pattern, row_scale
from sparse_bitnet.kernels import dispatch, structured_matmul, ternarize, ternary_matmul
from sparse_bitnet.kernels.measure import measure
from sparse_bitnet.kernels.quantize_activations import quantize_fused
from sparse_bitnet.kernels.weight import TernaryWeight, prepare

LAYERS = {
    "7B gate_up": (37888, 3584),
    "7B down": (3584, 18944),
    "7B qkv": (4608, 3584),
    "7B o": (3584, 3584),
    "3B gate_up": (22016, 2048),
    "3B down": (2048, 11008),
}
FEW = (1, 2, 4, 8, 16, 32)
MANY = (512, 4096, 16384)
PATTERNS = ("6:8", "2:4")
MODELS = ("7B", "3B")
FP8_LARGEST = 448.0


def weight_of(out: int, columns: int, pattern: str) -> TernaryWeight:
    """A ternary weight of random values, laid out for every backend."""
    ternary, scale = ternarize(torch.randn(out, columns, device="cuda"), Pattern.parse(pattern))
    return prepare(ternary, row_scale(scale, (), out), Pattern.parse(pattern))


@torch.compile
def _int_mm_scale(product: Tensor, x_scale: Tensor, w_scale: Tensor) -> Tensor:
    return (product.float() * x_scale * w_scale).to(torch.bfloat16)


def int_mm(x: Tensor, weight: Tensor, w_scale: Tensor) -> Tensor:
    x_q, x_scale = quantize_fused(x)
    if x.shape[0] < 17:  # PyTorch's product wants more rows
        x_q = F.pad(x_q, (0, 0, 0, 17 - x.shape[0]))
    product = torch._int_mm(x_q, weight.t())[: x.shape[0]]
    return _int_mm_scale(product, x_scale, w_scale)


@torch.compile
def _fp8_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-5) / FP8_LARGEST
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def fp8(x: Tensor, weight: Tensor, w_scale: Tensor) -> Tensor:
    x_8, x_scale = _fp8_quantize(x)
    return torch._scaled_mm(
        x_8, weight.t(), x_scale, w_scale.unsqueeze(0), out_dtype=torch.bfloat16
    )


def deferred(x: Tensor, weight: TernaryWeight) -> Tensor:
    x_q, _ = quantize_fused(x, group=weight.group)
    assert weight.structured is not None
    return structured_matmul(x_q, None, weight.structured, weight.w_scale)


def layer_calls(name: str, tokens: int) -> dict[str, list[Callable[[], object]]]:
    """Every path of one layer, on as many copies as the cache demands."""
    out, columns = LAYERS[name]
    x = torch.randn(tokens, columns, device="cuda").bfloat16()
    count = copies_beyond_cache(out * columns // 4) if tokens <= max(FEW) else 1
    paths: dict[str, list[Callable[[], object]]] = {}

    def add(path: str, call: Callable[[], object]) -> None:
        paths.setdefault(path, []).append(call)

    for copy in range(count):
        dense = weight_of(out, columns, "dense")
        if copy == 0:
            measure(dense, tokens)
        add("dense", partial(dispatch.ternary_linear, x, dense, backend="dense"))
        if tokens <= dispatch.MOST_PACKED_TOKENS:
            add("packed", partial(dispatch.ternary_linear, x, dense, backend="packed"))
        add("bf16", partial(F.linear, x, torch.randn_like(dense.dense, dtype=torch.bfloat16)))
        if copy < 4:  # reads a byte a weight: four copies overflow the cache
            add("int_mm", partial(int_mm, x, dense.dense, dense.w_scale))
            add("fp8", partial(fp8, x, dense.dense.to(torch.float8_e4m3fn), dense.w_scale))
            for pattern in PATTERNS:
                weight = weight_of(out, columns, pattern)
                sparse = weight.sparse_backend
                if sparse is None:
                    continue
                add(pattern, partial(dispatch.ternary_linear, x, weight, backend=sparse))
                add(f"{pattern} deferred", partial(deferred, x, weight))
    return paths


@torch.compile
def _gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def mlp_calls(size: str, tokens: int) -> dict[str, list[Callable[[], object]]]:
    """A gated MLP by every path."""
    (two, hidden), (_, inner) = LAYERS[f"{size} gate_up"], LAYERS[f"{size} down"]
    x = torch.randn(tokens, hidden, device="cuda").bfloat16()

    def bf16(first: Tensor, second: Tensor) -> Tensor:
        return F.linear(_gated(F.linear(x, first)), second)

    def ours(first: TernaryWeight, second: TernaryWeight) -> Tensor:
        if first.structured is None or second.structured is None:
            y = dispatch.ternary_linear(x, first, backend="dense")
            y_q, y_scale = quantize_fused(y, swiglu=True)
            return ternary_matmul(y_q, y_scale, second.dense, second.w_scale, None, x.dtype)
        x_q, x_scale = quantize_fused(x, group=first.group)
        y = structured_matmul(x_q, None, first.structured, first.w_scale)
        y_q, y_scale = quantize_fused(y, swiglu=True, group=second.group, factor=x_scale)
        return structured_matmul(y_q, y_scale, second.structured, second.w_scale)

    weights = [torch.randn(s, device="cuda").bfloat16() for s in ((two, hidden), (hidden, inner))]
    calls: dict[str, list[Callable[[], object]]] = {"bf16": [partial(bf16, *weights)]}
    for pattern in ("dense", *PATTERNS):
        pair = (weight_of(two, hidden, pattern), weight_of(hidden, inner, pattern))
        for weight in pair:
            measure(weight, tokens)
        calls[pattern] = [partial(ours, *pair)]
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[*FEW, *MANY])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--minutes", type=float, default=60.0, help="begin nothing after that")
    parser.add_argument("--name", default="layers", help="of the JSON file")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    options = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64  # the compiled parts of the baselines, a few shapes
    rows: list[dict[str, Any]] = []
    layers = [name for name in options.layers if name.split()[0] in options.models]
    cases = [(name, t) for name in layers for t in options.tokens]
    cases += [(f"{size} mlp", t) for size in options.models for t in options.tokens if t >= 4096]
    until = time.monotonic() + 60 * options.minutes
    with torch.no_grad(), console.progress("layers", len(cases)) as task:
        for name, tokens in cases:
            if time.monotonic() > until:
                console.say(f"out of time: {len(cases) - len(rows)} rows are left out")
                break
            make = mlp_calls if name.endswith("mlp") else layer_calls
            calls = make(name.removesuffix(" mlp"), tokens)
            rounds = 4 if len(calls["bf16"]) == 1 and tokens < 4096 else 1
            times = interleaved(calls, options.repeats, rounds)
            medians = {path: statistics.median(t) for path, t in times.items()}
            rows.append(
                {
                    "layer": name,
                    "tokens": tokens,
                    "microseconds": {path: summary(t) for path, t in times.items()},
                    "over_dense": {p: medians["dense"] / t for p, t in medians.items()},
                    "over_bf16": {p: medians["bf16"] / t for p, t in medians.items()},
                }
            )
            line = "  ".join(
                f"{path} {t:.1f} ({medians['bf16'] / t:.2f}×)" for path, t in medians.items()
            )
            console.out.print(f"{name:11} {tokens:6}  {line}", markup=False)
            write(options.name, rows, options.out)
            del calls
            torch.cuda.empty_cache()
            task.advance()


if __name__ == "__main__":
    main()
