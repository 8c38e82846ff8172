"""Costs of the Hopper product's tiles: measured on a GPU, fitted anywhere.

python benchmarks/gpu_tiles.py measure   every tile and split that serves a shape, cold weights
python benchmarks/gpu_tiles.py fit       costs for the table in kernels/matmul/hopper_plan.py

``measure --sparse`` takes weights that keep 2:4, stored for sparse tensor cores.

The costs are weights of the linear model in ``hopper_plan.estimate``, at least zero, fitted for
each tile to the least relative error. ``fit`` also prints how much slower the chosen tile is than
the best that was measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls

from gpu_common import FEWEST_CALLS, RESULTS, copies_beyond_cache, interleaved, write
from sparse_bitnet.kernels.matmul import hopper, tiles
from sparse_bitnet.kernels.matmul.hopper_plan import FALLBACK, SPLITS, TILES, Plan, Tile, estimate

SHAPES = {
    "7B": {"gate_up": (37888, 3584), "down": (3584, 18944), "qkv": (4608, 3584), "o": (3584, 3584)},
    "3B": {"gate_up": (22016, 2048), "down": (2048, 11008), "qkv": (2560, 2048), "o": (2048, 2048)},
    "1.5B": {
        "gate_up": (17920, 1536),
        "down": (1536, 8960),
        "qkv": (2048, 1536),
        "o": (1536, 1536),
    },
}
TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
MULTIPROCESSORS = 132
FILE = RESULTS / "nvidia-h200" / "matmul_tiles.json"


def name(tile: Tile) -> str:
    return f"{tile.kind} {tile.rows}x{tile.tokens}"


def candidates(tokens: int, out: int, columns: int) -> list[Plan]:
    """What :func:`cheapest` chooses among."""
    row_blocks, k_blocks = tiles.blocks(out, columns)
    plans = []
    for tile in TILES:
        count = -(-row_blocks // tile.warpgroups) * -(-tokens // tile.tokens)
        if tile.tokens >= 2 * max(tokens, TILES[0].tokens) and tile is not FALLBACK:
            continue
        for splits in SPLITS if tile.kind == "few" else (1,):
            fits = tile.kind == "many" or (
                k_blocks >= splits * tile.blocks
                and count <= hopper._clusters(tile, splits, torch.cuda.current_device())
            )
            if fits:
                plans.append(Plan(tile, splits))
    return plans


def measure(
    models: list[str], counts: list[int], repeats: int, sparse: bool, folder: Path | None
) -> None:
    rows: list[dict[str, Any]] = []
    for tokens in counts:
        for model in models:
            for layer, (out, columns) in SHAPES[model].items():
                ternary = torch.randint(-1, 2, (out, columns), dtype=torch.int8, device="cuda")
                if sparse:
                    ternary[:, ::2] = 0  # where the zeros are does not matter
                packed = tiles.pack(ternary, sparse)
                weights = [packed.clone() for _ in range(copies_beyond_cache(packed.numel()))]
                x = torch.randint(-127, 128, (tokens, columns), dtype=torch.int8, device="cuda")
                x_scale, w_scale = torch.rand(tokens).cuda() + 0.1, torch.rand(out).cuda() + 0.1
                plans = candidates(tokens, out, columns)
                calls = {
                    str(plan): [
                        partial(
                            hopper.matmul,
                            x,
                            x_scale,
                            w,
                            w_scale,
                            None,
                            torch.bfloat16,
                            sparse=sparse,
                            how=plan,
                        )
                        for w in weights
                    ]
                    for plan in plans
                }
                measured = interleaved(calls, repeats, FEWEST_CALLS)
                for plan in plans:
                    times = measured[str(plan)]
                    rows.append(
                        {
                            "layer": f"{model} {layer}",
                            "tokens": tokens,
                            "tile": name(plan.tile),
                            "splits": plan.splits,
                            "microseconds": round(statistics.median(times), 3),
                        }
                    )
        write("matmul_tiles_sparse" if sparse else "matmul_tiles", rows, folder)


def fit(file: Path) -> None:
    rows = json.loads(file.read_text())["rows"]
    of_tile = defaultdict(list)
    for row in rows:
        model, layer = row["layer"].split()
        row["shape"] = SHAPES[model][layer]
        of_tile[row["tile"]].append(row)
    unit = np.eye(7)
    fitted = {}
    for tile in TILES:
        # A feature of the model is its value where that cost is one and the others are zero.
        features = np.array(
            [
                [
                    estimate(
                        replace(tile, costs=tuple(unit[i])),
                        row["splits"],
                        row["tokens"],
                        *row["shape"],
                        MULTIPROCESSORS,
                    )
                    for i in range(7)
                ]
                for row in of_tile[name(tile)]
            ]
        )
        if tile.kind == "many":
            features[:, 2] = 0  # its chains are as long as its load: not to be told apart
        times = np.array([row["microseconds"] for row in of_tile[name(tile)]])
        costs = nnls(features / times[:, None], np.ones(len(times)))[0]
        fitted[name(tile)] = costs
        error = np.percentile(features @ costs / times, [5, 95])
        print(
            f"{name(tile):14} ({', '.join(f'{c:.3f}' for c in costs)}), "
            f"{len(times)} points, 90 % of estimates within {error[0]:.2f}-{error[1]:.2f}"
        )
    chosen = defaultdict(list)
    for row in rows:
        tile = next(t for t in TILES if name(t) == row["tile"])
        tile = replace(tile, costs=tuple(fitted[row["tile"]]))
        guess = estimate(tile, row["splits"], row["tokens"], *row["shape"], MULTIPROCESSORS)
        chosen[row["layer"], row["tokens"]].append((guess, row["microseconds"]))
    losses = [min(c)[1] / min(time for _, time in c) for c in chosen.values()]
    print(f"chosen over best: mean {np.mean(losses):.3f}, 95 % {np.percentile(losses, 95):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("measure", "fit"))
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--sparse", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    options = parser.parse_args()
    if options.what == "measure":
        measure(options.models, options.tokens, options.repeats, options.sparse, options.out)
    else:
        fit(options.file)


if __name__ == "__main__":
    main()
