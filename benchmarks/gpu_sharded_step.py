"""Training steps over several GPUs with FSDP2: python benchmarks/gpu_sharded_step.py

Rows, by what is gathered for forward and backward:

    bf16       the BF16 model, masters gathered in bf16 (FSDP2's mixed precision)
    two bits   this package at 6:8, ``nn.shard``: ternary weights in two bits and γ
    float32    this package at 6:8, ``fully_shard``: masters as they are

on 1, 2, 4 … GPUs of one host, each number in processes of its own (torchrun); on one GPU nothing is
sharded. Master weights and gradients are float32, products bf16 or int8, blocks compiled. Every GPU
takes ``--sequences`` of 2,048 tokens a step, so ``tokens_per_second`` is of all GPUs, and
``efficiency`` that of one GPU of it over that of one GPU alone, where both are rows of one call
(or were put together by hand). ``received_bytes`` is what a rank
gets in a step, by collective; ``memory`` its peak. ``communication`` is the time of NCCL's kernels
in a profiled step, ``exposed`` the part of it in which no other kernel runs.

``--simulate 8 64`` measures the memory of one rank of so many on a single GPU: its collectives do
nothing, so values are not those of a model, but what is allocated is. With ``--sequences 1 --length
128`` activations are few, and what is left is beside ``expected``, the arithmetic of ``estimate``.

Writes ``results/<gpu>/sharded_step.json`` after every row.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_common import write
from sparse_bitnet.data.loader import Batch
from sparse_bitnet.estimate.devices import GPUS
from sparse_bitnet.estimate.estimate import sharding
from sparse_bitnet.nn import convert
from sparse_bitnet.nn.shards import shard
from sparse_bitnet.train.config import OptimizerConfig
from sparse_bitnet.train.loss import CausalLoss
from sparse_bitnet.train.model import maskless_attention
from sparse_bitnet.train.optim import build_optimizer, clip_gradients
from sparse_bitnet.train.parallel import blocks, compile_blocks
from training_models import base_model

ROWS = ("bf16", "two bits", "float32")
SEQUENCE = 2048
SEQUENCES = {"qwen2.5-1.5b": 8, "qwen2.5-3b": 4, "qwen2.5-7b": 1}


class Received(TorchDispatchMode):
    """Bytes that collectives leave on this rank, by operation and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensor = args[0] if isinstance(args[0], Tensor) else args[0][0]
            self.bytes[f"{func._opname} {tensor.dtype}"] += tensor.numel() * tensor.itemsize
        return func(*args, **(kwargs or {}))


def wait_of(events: list[Any]) -> tuple[float, float]:
    """Milliseconds in which NCCL's kernels run, and of these in which nothing else does."""
    nccl = sorted((e.start_ns(), e.end_ns()) for e in events if "nccl" in e.name())
    others = sorted((e.start_ns(), e.end_ns()) for e in events if "nccl" not in e.name())

    def merged(spans: list[tuple[int, int]]) -> list[list[int]]:
        out: list[list[int]] = []
        for start, end in spans:
            if out and start <= out[-1][1]:
                out[-1][1] = max(out[-1][1], end)
            else:
                out.append([start, end])
        return out

    busy, covered = merged(nccl), merged(others)
    hidden, index = 0, 0
    for start, end in busy:
        while index < len(covered) and covered[index][1] <= start:
            index += 1
        at = index
        while at < len(covered) and covered[at][0] < end:
            hidden += min(end, covered[at][1]) - max(start, covered[at][0])
            at += 1
    total = sum(end - start for start, end in busy)
    return total / 1e6, (total - hidden) / 1e6


def one_row(preset: str, row: str, sequences: int, length: int, steps: int) -> dict[str, Any]:
    """Times of one way to train, in every process; the row of the first."""
    world = dist.get_world_size()
    device = torch.device("cuda", torch.cuda.current_device())
    model = base_model(preset, None, device)
    if row != "bf16":
        convert(model, "6:8")
    loss_of = CausalLoss(model)
    compile_blocks(model)
    if world > 1:
        mesh = init_device_mesh("cuda", (world,))
        options: dict[str, Any] = {"mesh": mesh}
        if row == "bf16":
            options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        cut = shard if row == "two bits" else fully_shard
        for block in blocks(model):
            cut(block, **options)
        # The head is whole and in float32 where the loss is computed, in every row.
        cut(loss_of, mesh=mesh)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=1e-5))
    torch.manual_seed(dist.get_rank())
    vocabulary = model.config.vocab_size
    tokens = torch.randint(0, vocabulary, (sequences, length + 1), device=device)
    batch = Batch.of(tokens)

    def step() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss: Tensor = loss_of(batch)[0]
        loss.backward()
        clip_gradients(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    with maskless_attention(model):
        first = step().item()
        step()
        torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(steps):
            dist.barrier()
            torch.cuda.synchronize()
            started = time.perf_counter()
            step()
            torch.cuda.synchronize()
            times.append((time.perf_counter() - started) * 1e3)
        memory = torch.cuda.max_memory_allocated()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            step()
            torch.cuda.synchronize()
        on_gpu = [
            e
            for e in profiler.profiler.kineto_results.events()
            if e.device_type() == torch.autograd.DeviceType.CUDA
        ]
        communication, exposed = wait_of(on_gpu)
        received: Counter[str] = Counter()
        if world > 1:
            with Received() as counted:
                step()
            received = counted.bytes
    milliseconds = statistics.median(times)
    weights = sum(p.numel() for b in blocks(model) for p in b.parameters() if p.ndim > 1)
    others = sum(p.numel() for p in parameters) - weights
    layers = model.config.num_hidden_layers
    plan = sharding(weights, layers, others, GPUS["h200"], world, world * sequences * length)
    return {
        "model": preset,
        "row": row,
        "gpus": world,
        "sequences": sequences,
        "milliseconds": milliseconds,
        "all_milliseconds": [round(t, 2) for t in times],
        "tokens_per_second": world * sequences * length / milliseconds * 1e3,
        "memory": memory,
        "expected": {"shards": plan["shards"], "whole": plan["whole"]},
        "weights": weights,
        "received_bytes": dict(received),
        "communication": communication,
        "exposed": exposed,
        "first_loss": first,
    }


def child(options: argparse.Namespace) -> None:
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if options.simulate:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", rank=0, world_size=options.simulate[0], store=FakeStore())
    else:
        dist.init_process_group("nccl")
    try:
        row = one_row(
            options.models[0], options.rows[0], options.sequences, options.length, options.steps
        )
        if dist.get_rank() == 0:
            print("ROW " + json.dumps(row), flush=True)
    finally:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(SEQUENCES)[:2], choices=SEQUENCES)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--gpus", nargs="+", type=int, help="1, 2, 4 … as many as there are")
    parser.add_argument("--sequences", type=int, help="of a GPU and step")
    parser.add_argument("--length", type=int, default=SEQUENCE, help="tokens of a sequence")
    parser.add_argument("--simulate", nargs="+", type=int, help="ranks; memory alone")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=9.0, help="begin nothing after that")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    there = torch.cuda.device_count()
    counts = options.simulate or options.gpus or [n for n in (1, 2, 4, 8) if n <= there]
    rows: list[dict[str, Any]] = []
    until = time.monotonic() + 60 * options.minutes
    for model in options.models:
        for name in options.rows:
            for count in counts:
                if time.monotonic() > until or (count == 1 and name == "float32"):
                    continue  # on one GPU nothing is gathered
                sequences = options.sequences or SEQUENCES[model]
                command = [sys.executable]
                if not options.simulate:
                    command += ["-m", "torch.distributed.run", "--standalone"]
                    command += [f"--nproc-per-node={count}"]
                command += [__file__, "--child", "--models", model, "--rows", name]
                command += ["--sequences", str(sequences), "--length", str(options.length)]
                command += ["--steps", str(options.steps)]
                if options.simulate:
                    command += ["--simulate", str(count)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                found = [line for line in done.stdout.splitlines() if line.startswith("ROW ")]
                if not found:
                    why = done.stderr[-1500:]
                    rows.append({"model": model, "row": name, "gpus": count, "failed": why})
                    print(f"{model} {name} on {count}: failed\n{why}", flush=True)
                    continue
                row = json.loads(found[0].removeprefix("ROW "))
                alone = [
                    r
                    for r in rows
                    if r["model"] == model and r["gpus"] == 1 and "milliseconds" in r
                    if r["row"] == (name if name != "float32" else "two bits")
                ]
                if alone:
                    per_gpu = row["tokens_per_second"] / count
                    row["efficiency"] = per_gpu / alone[0]["tokens_per_second"]
                rows.append(row)
                gathered = sum(v for k, v in row["received_bytes"].items() if "gather" in k)
                print(
                    f"{model} {name:9} on {count}: {row['milliseconds']:7.1f} ms, "
                    f"{row['tokens_per_second']:9,.0f} tokens/s, "
                    f"efficiency {row.get('efficiency', 1):.3f}, {row['memory'] / 2**30:.1f} GiB, "
                    f"gathered {gathered / row['weights']:.2f} bytes a weight, "
                    f"NCCL {row['communication']:.1f} ms, exposed {row['exposed']:.1f}",
                    flush=True,
                )
                write("sharded_memory" if options.simulate else "sharded_step", rows, options.out)


if __name__ == "__main__":
    main()
