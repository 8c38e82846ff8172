"""The output head, and the embedding tied to it, in int8 with a scale for each row.

Beside ternary linears the head is the largest matrix of a small model: at 151,936 tokens it is 75 %
of a packed Qwen2.5-0.5B. Row-wise int8 halves it (from bfloat16) and cost 0.010 and 0.025 % of
perplexity on two models (docs/deploy.md). Of a model whose embedding is the head's weight one int8
table serves both: its rows are looked up going in and multiplied with coming out. An embedding of
its own stays as it is, as looking rows up costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparse_bitnet.core import ConfigError, check_finite
from sparse_bitnet.kernels.int8_linear import int8_linear
from sparse_bitnet.nn.packed_module import StoredModule
from sparse_bitnet.nn.sparse_bit_linear import output_dtype

LARGEST = 127
ROWS_AT_ONCE = 2**13


class Int8Table(StoredModule):
    """Rows of int8 and a scale for each.

    Buffers, which are also its state dict: ``weight`` (int8 ``[rows, width]``), ``weight_scale``
    (float32 ``[rows]``) and, if ``bias``, ``bias`` (``[rows]``, in the model's dtype).

    Args:
        rows, width: of the table; a vocabulary, and the model's hidden size.
        bias: whether there is one.
        where: the module's name, for error messages.
        device, dtype: where to make the (empty) buffers, and the dtype of results and bias.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        rows: int,
        width: int,
        bias: bool = False,
        *,
        where: str = "table",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(where)
        self.register_buffer("weight", torch.empty(rows, width, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.empty(rows, dtype=torch.float32, device=device))
        empty = torch.empty(rows, device=device, dtype=dtype) if bias else None
        self.register_buffer("bias", empty)
        self.register_buffer(
            "_as_model", torch.empty(0, device=device, dtype=dtype), persistent=False
        )

    def dequantize(self) -> Tensor:
        """The table in the model's dtype: ``[rows, width]``."""
        return (self.weight * self.weight_scale.unsqueeze(-1)).to(self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        """The dtype that the model around it was moved to."""
        return self.get_buffer("_as_model").dtype

    def product(self, x: Tensor) -> Tensor:
        """``[..., width]`` → ``[..., rows]``."""
        return int8_linear(x, self.weight, self.weight_scale, self.bias, output_dtype(x))

    def extra_repr(self) -> str:
        rows, width = self.weight.shape
        return f"{rows}, {width}, bias={self.bias is not None}"


class Int8Embedding(Int8Table):
    """The inference form of ``nn.Embedding``: ``[...]`` → ``[..., width]`` in the model's dtype."""

    def forward(self, ids: Tensor) -> Tensor:
        return (self.weight[ids] * self.weight_scale[ids].unsqueeze(-1)).to(self._dtype)


class Int8Head(Int8Table):
    """The inference form of the output ``nn.Linear``: ``[..., width]`` → ``[..., rows]``."""

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)


class TiedInt8Head(nn.Module):
    """The output head of a model whose embedding is the head's weight; stores nothing itself.

    Tied parameters stay tied when a model moves, tied buffers do not: so this refers to the module.
    """

    def __init__(self, table: Int8Table) -> None:
        super().__init__()
        self._table = (table,)  # in a tuple, or it would be a part of this module too

    @property
    def table(self) -> Int8Table:
        """The embedding that is the head's weight."""
        return self._table[0]

    @property
    def weight(self) -> Tensor:
        """int8 ``[rows, width]``, of the embedding."""
        return self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.table.product(x)


def quantize_rows(weight: Tensor, where: str = "weight") -> tuple[Tensor, Tensor]:
    """Float ``[rows, width]`` → int8 of the same shape and float32 ``[rows]``: W ≈ scale · int8.

    Raises:
        WeightError: if a value is NaN or infinite.
    """
    check_finite(weight, where)
    quantized = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    parts = (tensor.split(ROWS_AT_ONCE) for tensor in (weight.detach(), quantized, scale))
    for some, there, steps in zip(*parts, strict=True):
        rows = some.float()
        step = rows.abs().amax(-1) / LARGEST
        steps[:] = torch.where(step > 0, step, torch.ones_like(step))  # a vocabulary's padding
        there[:] = (rows / steps.unsqueeze(-1)).round_().clamp_(-LARGEST, LARGEST)
    return quantized, scale


def int8_modules(model: Any) -> list[str]:
    """Names of the modules that an int8 head replaces: the head, after a tied embedding.

    Args:
        model: a causal language model of transformers.

    Raises:
        ConfigError: if it has no plain linear head, or is tied to something else than a plain
            embedding.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    names = {module: name for name, module in model.named_modules()}
    if type(head) is not nn.Linear or head not in names:
        raise ConfigError(
            f"head int8: the output head of this {type(model).__name__} is a "
            f"{type(head).__name__}, and only a plain nn.Linear can become int8"
        )
    if head.weight is not getattr(embedding, "weight", None):
        return [names[head]]
    if type(embedding) is not nn.Embedding:
        raise ConfigError(
            f"head int8: it is tied to a {type(embedding).__name__}, which does more than look up "
            "rows; only a plain nn.Embedding can share an int8 table"
        )
    return [names[embedding], names[head]]


def swap_int8(model: Any, names: Iterable[str], device: torch.device | str | None = "meta") -> None:
    """Put empty int8 modules in the place of an embedding and a head, tied if they were.

    Args:
        model: of transformers.
        names: as of :func:`int8_modules`.
        device: of the empty buffers.

    Raises:
        ConfigError: if a name is of no module or of another kind of module, or if a float module
            would stay tied to an int8 one.
    """
    modules = dict(model.named_modules())
    tied = model.all_tied_weights_keys
    for name in names:
        module = modules.get(name)
        if type(module) not in (nn.Embedding, nn.Linear):
            raise ConfigError(
                f"{name}: a {type(module).__name__} cannot be int8; only an nn.Embedding or "
                "nn.Linear can"
            )
        assert isinstance(module, nn.Embedding | nn.Linear)
        source = tied.pop(f"{name}.weight", None)
        table = None if source is None else model.get_submodule(source.removesuffix(".weight"))
        if isinstance(table, Int8Table):
            known = model._tied_weights_keys or {}
            model._tied_weights_keys = {k: v for k, v in known.items() if k != f"{name}.weight"}
            model.set_submodule(name, TiedInt8Head(table))
            continue
        kind = Int8Embedding if isinstance(module, nn.Embedding) else Int8Head
        rows, width = module.weight.shape
        bias = getattr(module, "bias", None) is not None
        empty = kind(rows, width, bias, where=name, device=device, dtype=module.weight.dtype)
        model.set_submodule(name, empty)
    for target, source in tied.items():
        if isinstance(model.get_submodule(source.rpartition(".")[0]), Int8Table):
            raise ConfigError(f"{target}: it is tied to {source}, which is int8, and is not itself")
