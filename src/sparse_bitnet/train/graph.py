"""Forward and backward of a step as one CUDA graph.

A small model's kernels run for a few microseconds each, less than a host needs to launch them, so
the GPU waits: at 5M weights about half of the time. A graph launches all of them at once. What it
replays is fixed: the shapes, the addresses (batches are copied into the first one's place,
gradients are written over the last ones), and the pattern (a change captures anew). Ternary weights
are derived inside the graph, so a replay sees every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparse_bitnet.data.loader import Batch

WARMUPS = 3  # compilation, kernel choices and workspaces, before anything is recorded


class GraphedBackward:
    """Call it with the micro-batches of a step: fills ``.grad``, returns the loss.

    Args:
        backward: adds the gradients of the given micro-batches to ``.grad`` and returns their mean
            loss; without a synchronisation.
        parameters: whose gradients are filled. They must not be cleared between calls.
    """

    def __init__(
        self, backward: Callable[[Sequence[Batch]], Tensor], parameters: Sequence[Tensor]
    ) -> None:
        self._backward, self._parameters = backward, parameters
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Batch] = []
        self._loss: Tensor | None = None

    def __call__(self, micro_batches: Sequence[Batch]) -> Tensor:
        if self._graph is None:
            self._graph = self._capture(micro_batches)
        for mine, given in zip(self._inputs, micro_batches, strict=True):
            mine.inputs.copy_(given.inputs, non_blocking=True)
            mine.labels.copy_(given.labels, non_blocking=True)
        self._graph.replay()
        assert self._loss is not None
        return self._loss.clone()  # the next replay writes over it

    def reset(self) -> None:
        """Capture anew at the next call."""
        self._graph = None

    def _capture(self, micro_batches: Sequence[Batch]) -> torch.cuda.CUDAGraph:
        self._inputs = [batch.map(Tensor.clone) for batch in micro_batches]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        # Dropout of the replay starts where an eager step's would, so a resumed run repeats it.
        with torch.cuda.stream(aside), torch.random.fork_rng([torch.cuda.current_device()]):
            for _ in range(WARMUPS):
                self._clear()
                self._backward(self._inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self._clear()  # gradients that the graph makes belong to its memory
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._loss = self._backward(self._inputs)
        return graph

    def _clear(self) -> None:
        for p in self._parameters:
            p.grad = None
