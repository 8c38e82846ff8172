"""Ranks, FSDP2 sharding and per-block compilation.

``torchrun`` tells each process its place through the environment; without it there is one process
and no process group. Many processes shard with FSDP2: every block is a group of its own, and the
rest (embeddings, last norm, head) is the root's, so the head is whole where the loss is computed.

Parameters are gathered in float32, as they are kept: norms, embeddings and head compute in full
precision, and one process computes with the very same values. Autocast makes products bf16.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel

from sparse_bitnet.core import ConfigError, SparseBitNetError
from sparse_bitnet.kernels import compiled
from sparse_bitnet.nn import SparseBitLinear
from sparse_bitnet.nn import shard as shard_module
from sparse_bitnet.train.loss import CausalLoss

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True for the process that writes files and talks to the person."""
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        return self.world_size > 1

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a scalar over ranks; stays on its device."""
        if self.is_distributed:
            value = value.clone()
            dist.all_reduce(value)
            value = value / self.world_size
        return value

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. Goes over gloo, so a GPU's queue is not drained."""
        if not self.is_distributed:
            return flag
        together = torch.tensor([float(flag)])
        dist.all_reduce(together, op=dist.ReduceOp.MAX)
        return bool(together.item())

    def from_main(self, value: Any) -> Any:
        """The main process's value, on every rank."""
        if not self.is_distributed:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if not self.is_distributed:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def first_alone(self, make: Callable[[], T]) -> T:
        """What ``make`` returns, after the first rank of each host has called it: work that one
        does and the others find done. An error of the first ones is raised on all."""
        is_first = int(os.environ.get("LOCAL_RANK", "0")) == 0 or not self.is_distributed
        made, problem = None, None
        if is_first:
            try:
                made = make()
            except SparseBitNetError as error:
                problem = error
        problems = [one for one in self.gather(problem) if one is not None]
        if problems:
            raise problems[0]
        return make() if made is None else made

    def wait(self) -> None:
        """Until every rank is here."""
        self.any(False)


@contextmanager
def ranks(device: str) -> Iterator[Ranks]:
    """Join the process group that torchrun announces, if it does; leave it at the end.

    Args:
        device: ``"cpu"``, ``"cuda"`` or ``"auto"`` (CUDA where there is one).

    Raises:
        ConfigError: if CUDA is asked for and not there, or has fewer devices than local ranks.
    """
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ConfigError("run.device is cuda, but PyTorch finds no CUDA device; use cpu or auto")
    kind = "cuda" if device == "cuda" or (device == "auto" and has_cuda) else "cpu"
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Ranks(0, 1, torch.device(kind))
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    here = torch.device("cuda", local) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"torchrun started local rank {local}, but there are {torch.cuda.device_count()} "
                "CUDA devices: start as many processes as devices (--nproc-per-node)"
            )
        torch.cuda.set_device(here)
    joined = not dist.is_initialized()
    if joined:
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), world_size, here)
    finally:
        if joined:
            dist.destroy_process_group()


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's blocks: the members of its outermost ``ModuleList``."""
    lists = (module for module in model.base_model.modules() if isinstance(module, nn.ModuleList))
    return list(next(lists, []))


def compile_blocks(model: PreTrainedModel) -> None:
    """Compile each block's forward; equal blocks share one compilation."""
    # Runs of a sweep in one process differ in kind and pattern, and each may compile once more.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for block in blocks(model):
        ternary = any(isinstance(module, SparseBitLinear) for module in block.modules())
        options = dict(compiled.INDUCTOR_OPTIONS) if ternary else {}
        if model.device.type == "cpu":
            options |= compiled.cpu_options()
        block.compile(options=options or None)


def uncompile_blocks(model: PreTrainedModel) -> None:
    """Make an ordinary model of it again, which does not compile for every new shape."""
    for block in blocks(model):
        block._compiled_call_impl = None


def shard(model: CausalLoss, where: Ranks) -> None:
    """Cut a model over all ranks with FSDP2, in place; ternary weights are gathered as two bits."""
    mesh = init_device_mesh(where.device.type, (where.world_size,))
    for block in blocks(model.model):
        shard_module(block, mesh=mesh)
    shard_module(model, mesh=mesh)
