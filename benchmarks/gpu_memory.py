"""Memory that a packed model takes on a GPU: python benchmarks/gpu_memory.py

A model of a preset's shape with random weights is packed once for each pattern and storage, and
loaded in a process of its own. ``bytes_per_weight`` is what stays allocated,
``peak_bytes_per_weight`` the most that was while loading, both without the tensors that are not
ternary, for each ternary weight. ``default`` is true for the storage that ``pack`` chooses.

Writes ``results/<gpu>/memory.json``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from gpu_common import report, write
from sparse_bitnet import convert, load, pack
from sparse_bitnet.formats import STORAGES
from sparse_bitnet.nn.packed_module import PackedModule
from sparse_bitnet.train.presets import preset_config

PATTERNS = ("dense", "6:8", "4:8", "2:4")


def make(preset: str, pattern: str, storage: str, directory: Path) -> None:
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(preset_config(preset, None), dtype=torch.bfloat16)
    convert(model, pattern)
    pack(model, directory, storage=storage)


def loaded(directory: Path) -> dict[str, float]:
    """Bytes for each ternary weight of the model in that directory, in a fresh process."""
    torch.zeros(1, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model, _ = load(directory, device="cuda")
    peak, stays = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    weights = 0
    for module in model.modules():
        if isinstance(module, PackedModule):
            weights += sum(torch.Size(s).numel() for s in module.weight_shapes.values())
    others = {id(t): t.nbytes for t in model.parameters()}
    dense = sum(others.values())
    return {
        "weights": weights,
        "dense_bytes": dense,
        "bytes_per_weight": (stays - before - dense) / weights,
        "peak_bytes_per_weight": (peak - before - dense) / weights,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-1.5b")
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS))
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(loaded(options.load)))
        return
    rows: list[dict[str, Any]] = []
    for pattern in options.patterns:
        for storage in STORAGES:
            with tempfile.TemporaryDirectory() as folder:
                directory = Path(folder) / "packed"
                make(options.model, pattern, storage, directory)
                command = [sys.executable, __file__, "--load", str(directory)]
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            row = {"model": options.model, "pattern": pattern, "option": storage}
            row["default"] = storage == "two-bit"
            rows.append(row | json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
            write("memory", rows, options.out)
    report("memory", rows, options.out)


if __name__ == "__main__":
    main()
