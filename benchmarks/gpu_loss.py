"""Output head and cross-entropy on an NVIDIA GPU: python benchmarks/gpu_loss.py

Forward and backward from hidden states and a float32 head of 151,936 rows to the loss and both
gradients, under bf16 autocast, as a training step does. Candidates that are not installed or run
out of memory are noted: PyTorch's ``linear_cross_entropy`` begins with 2.13, Liger's wants
``pip install liger-kernel``. The error of the head's gradient is taken against the first candidate.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gpu_common import report, summary
from sparse_bitnet import console
from sparse_bitnet.train.loss import chunked_loss

VOCABULARY = 151_936
SHAPES = ((16384, 2048), (49152, 1536), (98304, 896))
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def full(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, head).float(), labels)


def chunk_loop(size: int, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """What a compiler is usually given: chunks that are computed again in backward."""

    def one(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, head).float(), y, reduction="sum")

    parts = zip(hidden.split(size), labels.split(size), strict=True)
    total = sum(checkpoint(one, x, y, use_reentrant=False) for x, y in parts)
    assert isinstance(total, Tensor)
    return total / labels.numel()


def liger() -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    module = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
    return lambda hidden, head, labels: module(head, hidden, labels)


def torch_own() -> Loss:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"needs PyTorch 2.13 or newer; this is {torch.__version__}")
    options = torch.nn.LinearCrossEntropyOptions()
    return partial(_torch_own, options)


def _torch_own(options: Any, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    loss: Tensor = F.linear_cross_entropy(hidden, head, labels, options=options)
    return loss


def candidates() -> dict[str, Callable[[], Loss]]:
    """Name → what makes the function, which may fail where it is not installed."""

    def ours(logits: int) -> Loss:
        return partial(_ours, logits // VOCABULARY)

    made: dict[str, Callable[[], Loss]] = {
        f"ours 2^{power}": partial(ours, 2**power) for power in (29, 26, 27, 28, 30)
    }
    made["ours"] = lambda: partial(_ours, None)
    made["torch"] = torch_own
    made["liger"] = liger
    made["compiled chunk loop"] = lambda: torch.compile(partial(chunk_loop, 2048))
    made["compiled, full logits"] = lambda: torch.compile(full)
    return made


def _ours(tokens: int | None, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    return chunked_loss(hidden, head, labels, tokens)[0]


def once(loss_of: Loss, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    hidden.grad = head.grad = None
    with torch.autocast("cuda", torch.bfloat16):
        loss = loss_of(hidden, head, labels)
    loss.backward()
    return loss.detach()


def measure(tokens: int, features: int, repeats: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, features, device="cuda", requires_grad=True)
    head = (0.02 * torch.randn(VOCABULARY, features, device="cuda")).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (tokens,), device="cuda")
    rows: list[dict[str, Any]] = []
    ready: dict[str, Loss] = {}
    truth: Tensor | None = None
    for name, make in candidates().items():
        row: dict[str, Any] = {"tokens": tokens, "features": features, "candidate": name}
        rows.append(row)
        try:
            loss_of = make()
            once(loss_of, hidden, head, labels)
            hidden.grad = head.grad = None
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            row["loss"] = float(once(loss_of, hidden, head, labels))
            row["extra_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
            assert head.grad is not None
            if truth is None:
                truth = head.grad.clone()
            row["head_gradient_error"] = float((head.grad - truth).norm() / truth.norm())
            ready[name] = loss_of
        except Exception as error:
            plain = isinstance(error, ImportError)
            row["failed"] = (str(error) if plain else f"{type(error).__name__}: {error}")[:300]
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(repeats):
        for name, loss_of in ready.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            once(loss_of, hidden, head, labels)
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3)
    for row in rows:
        name = row["candidate"]
        if name not in times:
            console.out.print(f"{tokens:6}×{features}  {name:22} {row['failed']}", markup=False)
            continue
        row["microseconds"] = summary(times[name])
        took = statistics.median(times[name]) * 1e-6
        row["tflops"] = 6.0 * tokens * features * VOCABULARY / took * 1e-12
        console.out.print(
            f"{tokens:6}×{features}  {name:22} {took * 1e3:7.2f} ms  {row['tflops']:4.0f} TFLOPS  "
            f"{row['extra_gib']:5.2f} GiB  head gradient {row['head_gradient_error']:.1e} off"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", type=int, default=1, help="how many of the shapes")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    options = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.automatic_dynamic_shapes = False
    rows: list[dict[str, Any]] = []
    for tokens, features in SHAPES[: options.shapes]:
        rows += measure(tokens, features, options.repeats)
        report("loss", rows, options.out)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
