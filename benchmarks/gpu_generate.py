"""Tokens by ``generate`` on an NVIDIA GPU: python benchmarks/gpu_generate.py

A 6:8 decoder of random weights continues prompts of 40 tokens by 6 and by 400, in turns: module by
module, and as recorded graphs (``modeling/graph.py``), which is what ``generate``, ``chat`` and
``serve`` do. All of a token is in the time: Python of transformers' loop, the choice of the next
token, and for graphs their recording. ``same_tokens`` is the part of both ways' new tokens that are
equal: float sums differ in order, and logits of random weights lie close.

Writes ``results/<gpu>/generate.json``, after every row.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decoders import random_decoder
from gpu_common import write
from sparse_bitnet.modeling import DecoderForCausalLM

PROMPT = 40
NEW = (6, 400)  # a short answer does not pay for its recording
MOST_BY_MODULES = 50
MODULES, GRAPH = "modules", "graph"


def seconds(model: DecoderForCausalLM, ids: Tensor, new: int) -> tuple[float, Tensor]:
    torch.cuda.synchronize()
    started = time.perf_counter()
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
    )
    torch.cuda.synchronize()
    return time.perf_counter() - started, found


def row_of(model: DecoderForCausalLM, batch: int, new: int, repeats: int) -> dict[str, Any]:
    ids = torch.randint(5, 1000, (batch, PROMPT), device="cuda")
    recorded, taken = model.graph, dict[str, list[float]]()
    texts = {}
    for turn in range(1 + repeats):
        for name, count in ((MODULES, min(new, MOST_BY_MODULES)), (GRAPH, new)):
            model.graph = recorded if name == GRAPH else (lambda *_: None)  # type: ignore[assignment]
            took, texts[name] = seconds(model, ids, count)
            if turn:  # the first compiles kernels
                taken.setdefault(name, []).append(1e3 * took / count)
    model.graph = recorded
    both = [text[:, PROMPT : PROMPT + MOST_BY_MODULES] for text in texts.values()]
    return {
        "batch": batch,
        "new": new,
        **{f"{name}_ms": round(statistics.median(times), 3) for name, times in taken.items()},
        "all": {name: [round(one, 3) for one in times] for name, times in taken.items()},
        "same_tokens": round((both[0] == both[1]).float().mean().item(), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["qwen2.5-1.5b", "qwen2.5-7b"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    options = parser.parse_args()
    rows = []
    for preset in options.models:
        model = random_decoder(preset, "6:8")
        for batch, new in product(options.batches, NEW):
            rows.append({"model": preset, **row_of(model, batch, new, options.repeats)})
            print(rows[-1], flush=True)
            write("generate", rows, options.out)
        del model


if __name__ == "__main__":
    main()
