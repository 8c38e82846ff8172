"""Timing every backend of a weight on the user's GPU, for :mod:`sparse_bitnet.kernels.dispatch`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from sparse_bitnet import console
from sparse_bitnet.core.errors import BackendError
from sparse_bitnet.kernels import tuning
from sparse_bitnet.kernels.dispatch import (
    DEFERRED,
    FEWEST_SPARSE_TOKENS,
    SPARSE_BACKENDS,
    backends,
    key_of,
    ternary_linear,
)
from sparse_bitnet.kernels.matmul import structured_matmul, triton_dense, triton_packed
from sparse_bitnet.kernels.quantize_activations import quantize_fused
from sparse_bitnet.kernels.weight import TernaryWeight, copies


@torch.no_grad()
def measure(
    weight: TernaryWeight, tokens: int, out_dtype: torch.dtype = torch.bfloat16
) -> dict[str, float]:
    """Time every backend, after choosing the best launch of each; remember all of it.

    Returns:
        Microseconds of the whole layer by backend; of a sparse one also without its token scale,
        which is what counts inside ``torch.compile``.
    """
    device = weight.device
    tokens = tuning.bucket(tokens)
    memory = tuning.memory(device.index)
    names = backends(weight, tokens, out_dtype)
    same = copies(weight)
    x = torch.randn(tokens, weight.in_features, device=device).to(torch.bfloat16)
    x_q, x_scale = quantize_fused(x)
    x_scale = x_scale.reshape(-1)
    shape = (tokens, weight.out_features, weight.in_features)
    y = torch.empty(shape[:2], dtype=out_dtype, device=device)
    label = f"measuring {tokens} tokens, [{shape[1]}, {shape[2]}] {weight.pattern}"
    dense = triton_dense.candidates(x_q, weight.dense)
    packed = triton_packed.candidates(tokens, weight.out_features) if "packed" in names else []
    with console.progress(label, len(dense) + len(packed) + len(names)) as task:

        def best(
            key: str, candidates: list[str], launch: Callable[[TernaryWeight, str], None]
        ) -> None:
            if memory.get(key):
                return  # measured with another weight of this shape
            times: dict[str, float] = {}
            calls = {name: [partial(launch, c, name) for c in same] for name in candidates}
            for candidate, call in calls.items():
                try:
                    times[candidate] = tuning.microseconds(call)
                except (RuntimeError, OutOfResources):
                    continue  # this GPU has too little shared memory for the tile, say
                finally:
                    task.advance()
            if times and tokens >= FEWEST_SPARSE_TOKENS:
                times = tuning.under_load(calls, times)
            if times:
                memory.put(key, times)

        best(
            triton_dense.memory_key(*shape),
            dense,
            lambda c, name: triton_dense.run(
                x_q, x_scale, c.dense, c.w_scale, None, y, triton_dense.CANDIDATES[name]
            ),
        )
        best(
            triton_packed.memory_key(*shape),
            packed,
            lambda c, name: triton_packed.run(
                x_q,
                x_scale,
                cast(Tensor, c.packed),
                c.w_scale,
                None,
                y,
                triton_packed.CANDIDATES[name],
            ),
        )
        times = {}
        settle = tuning.SETTLE_SECONDS if tokens >= FEWEST_SPARSE_TOKENS else 0.0
        for name in names:
            calls = [partial(ternary_linear, x, copy, None, out_dtype, name) for copy in same]
            try:
                calls[0]()  # lets the sparse library search its algorithms outside the graph
            except BackendError:  # the library has no such product for this GPU
                task.advance()
                continue
            times[name] = tuning.microseconds(calls, settle)
            if name in SPARSE_BACKENDS:
                calls = [partial(_deferred, x, copy) for copy in same]
                times[name + DEFERRED] = tuning.microseconds(calls, settle)
            task.advance()
    memory.put(key_of(weight, tokens, out_dtype), times)
    return times


def _deferred(x: Tensor, weight: TernaryWeight) -> Tensor:
    """The sparse layer up to the token scale."""
    x_q, _ = quantize_fused(x, group=weight.group)
    return structured_matmul(x_q, None, cast(Tensor, weight.structured), weight.w_scale)
