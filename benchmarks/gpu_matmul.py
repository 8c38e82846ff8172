"""Products of packed ternary weights on an NVIDIA GPU: python benchmarks/gpu_matmul.py

For each layer and token count, in turns and with cold weights (copies that overflow the L2 cache):
ours, ``torch._scaled_mm`` in fp8 with row-wise scales, bf16 cuBLAS, and ``humming``: int8 × int2 of
``humming-kernels``, where that is installed. ``sparse`` is ours of a weight that keeps 2:4.
``windows`` is what 6:8 would be as 2:4 over windows of four columns (arXiv 2603.05232): rows 1.5
times as long, tokens lifted outside of the time. ``product`` begins with quantized activations,
``layer`` with bf16 ones. From 4096 tokens on ``burst`` (a pause, one call, two timed) and
``sustained`` (the second half of a second back to back): a GPU at its power limit lowers its clock.

Writes ``results/<gpu>/matmul.json``, after every layer.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decoders import capture
from gpu_common import FEWEST_CALLS, copies_beyond_cache, interleaved, summary, write
from gpu_tiles import SHAPES
from sparse_bitnet import console
from sparse_bitnet.kernels.quantize_activations import quantize_fused
from sparse_bitnet.kernels.registry import (
    TernaryWeight,
    integer_linear,
    prepare,
    ternary_linear,
)

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)
LARGE = 4096
FP8_LARGEST = 448.0
PAUSE_SECONDS, SUSTAINED_SECONDS = 0.012, 0.5

Call = Callable[[], object]


@torch.compile
def _fp8_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-5) / FP8_LARGEST
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def _fp8(x: Tensor, scale: Tensor, weight: Tensor, w_scale: Tensor) -> Tensor:
    return torch._scaled_mm(
        x, weight.t(), scale_a=scale, scale_b=w_scale, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _humming(ternary: Tensor, count: int) -> list[Call]:
    """Layers of two-bit weights that take bf16 tokens and multiply int8 ones."""
    layer_class = importlib.import_module("humming.layer").HummingLayer
    layers = []
    for _ in range(count):
        layer = layer_class(
            *ternary.shape,
            weight_config={"dtype": "int2"},
            input_config={"dtype": "int8"},
            torch_dtype=torch.bfloat16,
        ).cuda()
        layer.load_from_unquantized(ternary.bfloat16())
        layer.transform()
        layers.append(layer)
    return layers


def candidates(tokens: int, out: int, columns: int) -> dict[str, list[Call]]:
    """Name of a backend and what is measured → the same call on each copy of the weight."""
    x = torch.randn(tokens, columns, device="cuda").bfloat16()
    x_q, x_scale = quantize_fused(x)
    ternary = torch.randint(-1, 2, (out, columns), dtype=torch.int8, device="cuda")
    w_scale = torch.rand(out, device="cuda") + 0.01

    def copies(weight: Tensor) -> list[Tensor]:
        return [weight, *(weight.clone() for _ in range(copies_beyond_cache(weight.nbytes) - 1))]

    def packed(weight: Tensor) -> list[TernaryWeight]:
        return [prepare(weight, w_scale) for _ in range(copies_beyond_cache(weight.numel() // 4))]

    ours = packed(ternary)
    humming = []
    if importlib.util.find_spec("humming"):
        humming = _humming(ternary, len(ours))
    ternary[:, ::2] = 0
    sparse = packed(ternary)
    ternary = torch.randint(-1, 2, (out, columns // 2 * 3), dtype=torch.int8, device="cuda")
    ternary[:, ::2] = 0
    windows = packed(ternary)
    lifted = torch.cat([x_q, x_q[:, columns // 2 :]], 1)
    bf16 = copies(torch.randn(out, columns, device="cuda").bfloat16())
    fp8 = copies(torch.randn(out, columns, device="cuda").to(torch.float8_e4m3fn))
    x_8, scale_8 = _fp8_quantize(x)
    row = w_scale[None]
    calls: dict[str, list[Call]] = {
        "ours product": [
            partial(integer_linear, x_q, x_scale, w, None, torch.bfloat16) for w in ours
        ],
        "ours layer": [partial(ternary_linear, x, w) for w in ours],
        "sparse product": [
            partial(integer_linear, x_q, x_scale, w, None, torch.bfloat16) for w in sparse
        ],
        "sparse layer": [partial(ternary_linear, x, w) for w in sparse],
        "windows product": [
            partial(integer_linear, lifted, x_scale, w, None, torch.bfloat16) for w in windows
        ],
        "bf16 layer": [partial(torch.mm, x, w.t()) for w in bf16],
        "fp8 product": [partial(_fp8, x_8, scale_8, w, row) for w in fp8],
        "fp8 layer": [lambda w=w: _fp8(*_fp8_quantize(x), w, row) for w in fp8],
    }
    if humming:
        calls["humming layer"] = [partial(layer, x) for layer in humming]
    return calls


def burst_and_sustained(same: Call, repeats: int) -> dict[str, Any]:
    call = capture([same]).replay  # small layers take less time than their launch by the host
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        time.sleep(PAUSE_SECONDS)
        call()
        start.record()
        call()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 500)
    count = max(4, int(SUSTAINED_SECONDS / 2 / (sorted(times)[len(times) // 2] * 1e-6)))
    for _ in range(count):
        call()
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return {"burst": summary(times), "sustained": start.elapsed_time(end) * 1e3 / count}


def measure(model: str, layer: str, tokens: int, repeats: int) -> list[dict[str, Any]]:
    out, columns = SHAPES[model][layer]
    calls = candidates(tokens, out, columns)
    operations = 2.0 * tokens * out * columns
    rows = []
    if tokens < LARGE:
        for name, times in interleaved(calls, repeats, FEWEST_CALLS).items():
            rows.append({"name": name, "microseconds": summary(times)})
    else:
        for name, same in calls.items():
            found = burst_and_sustained(same[0], repeats)
            rows.append(
                {"name": name, "microseconds": found["burst"], "sustained": found["sustained"]}
            )
    for row in rows:
        backend, what = row.pop("name").split()
        row |= {"model": model, "layer": layer, "tokens": tokens, "backend": backend, "what": what}
        row["pops"] = operations / row["microseconds"]["median"] / 1e9
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["7B", "3B"], choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for model in options.models:
            for layer in SHAPES[model]:
                for tokens in options.tokens:
                    rows += measure(model, layer, tokens, options.repeats)
                    torch.cuda.empty_cache()
                write("matmul", rows, options.out)
                console.say(f"{model} {layer}")


if __name__ == "__main__":
    main()
