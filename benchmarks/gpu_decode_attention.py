"""Attention of one new token a sequence on a GPU: python benchmarks/gpu_decode_attention.py

Over a static cache with 64 free slots, whose keys and values are cold (copies beyond the L2 cache
take turns), in CUDA graphs. ``cache_bandwidth`` is the part of the bandwidth of a plain read, in
the same run, at which the keys and values that count are read. ``sdpa`` is PyTorch's attention with
the key heads shared (``enable_gqa``).

Writes ``results/<gpu>/decode_attention.json``.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from gpu_common import FEWEST_CALLS, copies_beyond_cache, interleaved, report, summary
from sparse_bitnet.kernels.decode_attention import decode_attention

HEADS = {"qwen2.5-7b": (28, 4), "qwen2.5-3b": (16, 2)}  # of queries, of keys
WIDTH, FREE = 128, 64
BATCHES, CONTEXTS = (1, 4, 16, 32, 64, 128, 256), (512, 4096)
READ_BYTES = 2**30


def read_bandwidth() -> float:
    """Bytes a second of a plain reduction."""
    values = torch.ones(READ_BYTES // 4, device="cuda")
    times = interleaved({"read": [values.sum]})["read"]
    return READ_BYTES / statistics.median(times) * 1e6


def measure(model: str, batch: int, context: int, bandwidth: float) -> list[dict[str, Any]]:
    heads, key_heads = HEADS[model]
    shape = (batch, key_heads, context + FREE, WIDTH)
    query = torch.randn(batch, heads, 1, WIDTH, device="cuda").bfloat16()
    seen = (torch.arange(context + FREE, device="cuda") < context).view(1, 1, 1, -1)
    used = 2 * 2 * batch * key_heads * context * WIDTH
    caches = [
        torch.randn(2, *shape, device="cuda", dtype=torch.bfloat16)
        for _ in range(copies_beyond_cache(used))
    ]
    scale = WIDTH**-0.5
    calls = {
        "ours": [partial(decode_attention, query, k, v, seen, scale) for k, v in caches],
        "sdpa": [
            partial(
                F.scaled_dot_product_attention,
                query,
                k,
                v,
                attn_mask=seen,
                scale=scale,
                enable_gqa=True,
            )
            for k, v in caches
        ],
    }
    rows = []
    for name, times in interleaved(calls, 7, FEWEST_CALLS).items():
        row = {"model": model, "batch": batch, "context": context, "name": name}
        part = used / statistics.median(times) * 1e6 / bandwidth
        rows.append(row | {"microseconds": summary(times), "cache_bandwidth": part})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(HEADS), choices=HEADS)
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    options = parser.parse_args()
    bandwidth = read_bandwidth()
    rows: list[dict[str, Any]] = [{"name": "read", "bytes_per_second": bandwidth}]
    with torch.no_grad():
        for model in options.models:
            for context in CONTEXTS:
                for batch in BATCHES:
                    rows += measure(model, batch, context, bandwidth)
                    torch.cuda.empty_cache()
                    ours, theirs = rows[-2:]
                    print(
                        f"{model} {context:5} × {batch:3}: "
                        f"{ours['microseconds']['median']:7.1f} µs, {ours['cache_bandwidth']:.2f}; "
                        f"sdpa {theirs['microseconds']['median']:8.1f} µs",
                        flush=True,
                    )
    report("decode_attention", rows, options.out)


if __name__ == "__main__":
    main()
