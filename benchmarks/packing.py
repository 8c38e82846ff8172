"""What packing and loading cost: a Qwen2.5-1.5B-shaped model with random weights.

    python benchmarks/packing.py [--layers 28] [--folder DIRECTORY]

A trained directory is made first: float32 master weights, 6:8. Then each step runs in a process of
its own and reports its peak of resident memory, mapped file pages included, beside what it had
after its imports. `pack` reads the directory and writes it packed, which is what the verb does;
`load` opens the result through transformers and computes the logits of one token, the first use,
which derives the layout to compute with.

Targets: packing in at most 60 s and at most 1.3 times the float32 model's bytes; loading with at
most 1.5 times the packed weights plus the full-precision embeddings, over the imports.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table

from machine import measured_on
from sparse_bitnet.console import out, say
from sparse_bitnet.files import write_text
from sparse_bitnet.formats import STORAGES

RESULTS = Path(__file__).parent / "results"
SHAPE = {
    "vocab_size": 151_936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
}
PATTERN = "6:8"
PACK_SECONDS, PACK_FACTOR, LOAD_FACTOR = 60.0, 1.3, 1.5
GB = 1e9


def peak_bytes() -> int:
    """The largest resident memory that this process ever had."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def make_child(folder: Path, layers: int) -> dict[str, Any]:
    """Write the trained directory; report the sizes."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from sparse_bitnet.train.config import SparsityConfig
    from sparse_bitnet.train.export import save_trained

    torch.manual_seed(0)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=layers, **SHAPE))
    model.to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    # Not converted: the directory holds master weights, and says what the linears become.
    save_trained(model, None, folder / "trained", SparsityConfig(pattern=PATTERN))
    return {
        "float32_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "embedding_bytes": model.get_input_embeddings().weight.nbytes,
    }


def pack_child(folder: Path, storage: str) -> dict[str, Any]:
    from transformers.models.qwen2 import modeling_qwen2  # noqa: F401  # part of the imports

    from sparse_bitnet.packed.write import pack

    imports = peak_bytes()
    started = time.perf_counter()
    packed = pack(folder / "trained", folder / storage, storage=storage)
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time(),
        "imports_bytes": imports,
        "peak_bytes": peak_bytes(),
        "weights": packed.weights,
        "packed_bytes": packed.packed_bytes,
        "other_bytes": packed.other_bytes,
        "bits_per_weight": packed.bits_per_weight,
    }


def load_child(folder: Path) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.qwen2 import modeling_qwen2  # noqa: F401  # part of the imports

    from sparse_bitnet.packed import load  # noqa: F401

    imports = peak_bytes()
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder)
    loaded = time.perf_counter() - started
    result = {"imports_bytes": imports, "seconds": loaded, "peak_bytes": peak_bytes()}
    started = time.perf_counter()
    with torch.no_grad():
        model(torch.tensor([[1]]))
    result["first_token_seconds"] = time.perf_counter() - started
    result["first_token_peak_bytes"] = peak_bytes()
    return result


def child(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def summarize(
    made: dict[str, Any], packed: dict[str, dict[str, Any]], loaded: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The figures the targets are about."""
    summary: dict[str, Any] = {}
    for storage, pack in packed.items():
        load = loaded[storage]
        limit = LOAD_FACTOR * pack["packed_bytes"] + made["embedding_bytes"]
        over_imports = load["peak_bytes"] - load["imports_bytes"]
        summary[storage] = {
            "bits_per_weight": pack["bits_per_weight"],
            "pack_seconds": pack["seconds"],
            "pack_cpu_seconds": pack["cpu_seconds"],
            "pack_peak_bytes": pack["peak_bytes"],
            "pack_peak_over_float32": pack["peak_bytes"] / made["float32_bytes"],
            "load_seconds": load["seconds"],
            "load_peak_bytes": load["peak_bytes"],
            "load_peak_bytes_over_imports": over_imports,
            "load_limit_bytes": limit,
            "first_token_seconds": load["first_token_seconds"],
            "first_token_peak_bytes": load["first_token_peak_bytes"],
            "reached": {
                "pack time": pack["seconds"] <= PACK_SECONDS,
                "pack memory": pack["peak_bytes"] <= PACK_FACTOR * made["float32_bytes"],
                "load memory": over_imports <= limit,
            },
        }
    return summary


def show(summary: dict[str, Any], weights: int) -> None:
    table = Table("", *summary, title=f"{weights:,} weights in the linears, {PATTERN}")
    for name, key, unit, digits in (
        ("bits a weight", "bits_per_weight", 1, 3),
        ("pack, s", "pack_seconds", 1, 1),
        ("pack, CPU s", "pack_cpu_seconds", 1, 1),
        ("pack: peak, GB", "pack_peak_bytes", GB, 2),
        ("pack: peak / float32 model", "pack_peak_over_float32", 1, 3),
        ("load, s", "load_seconds", 1, 1),
        ("load: peak, GB", "load_peak_bytes", GB, 2),
        ("load: peak over imports, GB", "load_peak_bytes_over_imports", GB, 2),
        ("load: limit, GB", "load_limit_bytes", GB, 2),
        ("first token, s", "first_token_seconds", 1, 1),
        ("first token: peak, GB", "first_token_peak_bytes", GB, 2),
    ):
        table.add_row(name, *(f"{figures[key] / unit:.{digits}f}" for figures in summary.values()))
    out.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=28, help="of the 28 that the model has")
    parser.add_argument("--folder", type=Path, help="where to put the packed models for a while")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu" / "packing.json")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        step, folder, *rest = options.child
        if step == "make":
            figures = make_child(Path(folder), int(rest[0]))
        elif step == "pack":
            figures = pack_child(Path(folder), rest[0])
        else:
            figures = load_child(Path(folder) / rest[0])
        print(json.dumps(figures))
        return
    machine = measured_on() | {"safetensors": version("safetensors")}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        made = child("make", folder, str(options.layers))
        packed = {storage: child("pack", folder, storage) for storage in STORAGES}
        loaded = {storage: child("load", folder, storage) for storage in STORAGES}
    machine["load_average_after"] = os.getloadavg()[0]
    summary = summarize(made, packed, loaded)
    show(summary, packed["two-bit"]["weights"])
    result = {
        "question": "time and memory of packing and loading a Qwen2.5-1.5B-shaped model",
        "shape": SHAPE | {"num_hidden_layers": options.layers, "pattern": PATTERN},
        "summary": summary,
        "made": made,
        "pack": packed,
        "load": loaded,
        "environment": machine,
    }
    write_text(options.output, json.dumps(result, indent=1) + "\n")
    say(f"written to {options.output}")


if __name__ == "__main__":
    main()
