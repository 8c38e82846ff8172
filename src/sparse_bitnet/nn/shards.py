"""FSDP2 that gathers two bits a weight instead of 32.

Every rank ternarizes its own rows. γ of a matrix is a mean over all of its rows, so the sums of a
block's matrices are added over ranks first, in one all-reduce of float64: γ then does not depend on
how many ranks there are. Groups of M run along ``in`` and shards are cut along ``out`` (or along
experts), so masks are each rank's own. What FSDP2 gathers, for forward and again for backward, is
the ternary weight in two bits and γ; gradients are reduced to the float32 shards as ever. A product
keeps the two bits for its backward, in memory that FSDP2 frees with the layer, so nothing whole
outlives it.

The way into FSDP2 is its extension for tensor subclasses: a parameter whose shards have
``fsdp_pre_all_gather`` and ``fsdp_post_all_gather`` says itself what is gathered, and what is made
of it (:class:`sparse_bitnet.nn.gathered.GatheredTernary`).
"""

from __future__ import annotations

import inspect
import weakref
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional

from sparse_bitnet.core import ConfigError, scale_of
from sparse_bitnet.kernels.ternarize import scale_sums, two_bits
from sparse_bitnet.nn.derived import DerivedModule
from sparse_bitnet.nn.experts import SparseBitExperts
from sparse_bitnet.nn.gathered import GatheredTernary
from sparse_bitnet.nn.sparse_bit_linear import SparseBitLinear

aten = torch.ops.aten


def shard(module: nn.Module, **options: Any) -> FSDPModule:
    """``fully_shard``, with the ternary weights of a converted module gathered as two bits.

    Master weights are gathered as they are where two bits do not do: those of the full-precision
    baseline, those shared between modules, those of ``Method(gradient="masked")``, whose backward
    needs the mask as well, and those of a module at λ < 1 (``set_quantization``), which computes
    with the master weight. FSDP2 fixes what it gathers, so these stay whole when λ comes to 1.

    Args:
        module: as of ``fully_shard``; sharded modules in it keep their own groups.
        options: of ``fully_shard``.

    Raises:
        ConfigError: for ``shard_placement_fn``.
    """
    if options.get("shard_placement_fn") is not None:
        raise ConfigError(
            "shard: shard_placement_fn may cut groups of M apart; leave it out, so that every "
            "weight is cut along its first dimension"
        )
    uses = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    ignored = options.get("ignored_params") or set()
    group = _Group()
    for one in module.modules():
        if not isinstance(one, SparseBitLinear | SparseBitExperts):
            continue
        if one.method.gradient != "dense" or one.blend is not None:
            continue
        for name, weight in one.master_parameters().items():
            if isinstance(weight, DTensor) or uses[id(weight)] > 1 or weight in ignored:
                continue
            master = MasterShard(weight.detach(), _Source(one, name, weight.shape, group))
            setattr(one, name, nn.Parameter(master, weight.requires_grad))
    return fully_shard(module, **options)


def plain(tensor: Tensor) -> Tensor:
    """The same tensor, sharded or not, over the same memory, without how it is gathered."""
    if isinstance(tensor, MasterShard):
        return tensor.rows
    if isinstance(tensor, DTensor) and isinstance(local := tensor.to_local(), MasterShard):
        return DTensor.from_local(
            local.rows,
            tensor.device_mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )
    return tensor


class _Source:
    """Which weight a shard belongs to."""

    def __init__(self, module: DerivedModule, name: str, shape: torch.Size, group: _Group) -> None:
        self._module = weakref.ref(module)  # its parameter leads here: else nothing were freed
        self.name, self.shape, self.group = name, shape, group
        # A mesh counts its ranks in Python every time that it is asked, and a shard has one mesh.
        self._place: tuple[int, int] | None = None
        group.members.append(self)

    @property
    def module(self) -> DerivedModule:
        module = self._module()
        assert module is not None
        return module

    def local(self) -> Tensor:
        """The shard as it is now, ``[rows, in]`` or ``[experts, out, in]``."""
        weight: Tensor = getattr(self.module, self.name)
        return plain(weight.to_local() if isinstance(weight, DTensor) else weight).detach()

    def place(self, mesh: DeviceMesh) -> tuple[int, int]:
        """Rows (or experts) of every shard but the last ones, and the first of this rank's."""
        if self._place is None:
            length = -(-self.shape[0] // mesh.size())
            self._place = length, mesh.get_local_rank() * length
        return self._place

    def local_sizes(self, mesh: DeviceMesh) -> tuple[int, ...]:
        """How many of this rank's rows belong to each logical matrix of a fused weight."""
        whole = self.module.shard_sizes_of(self.name) or (self.shape[-2],)
        if len(self.shape) == 3:
            return whole
        length, first = self.place(mesh)
        rows, start = [], 0
        for one in whole:
            rows.append(max(0, min(start + one, first + length) - max(start, first)))
            start += one
        return tuple(rows)

    def sums(self, mesh: DeviceMesh) -> Tensor:
        """Sums and counts behind γ over this rank's rows: float64 ``[2, (experts,) matrices, n]``,
        n numbers to add up."""
        module, sizes = self.module, self.local_sizes(mesh)
        own = scale_sums(self.local(), module.pattern, module.method, sizes)
        if len(self.shape) == 2:
            return own
        _, first = self.place(mesh)
        sums = own.new_zeros((2, self.shape[0], *own.shape[2:]))
        sums[:, first : first + own.shape[1]] = own
        return sums


class _Group:
    """Weights that FSDP2 gathers together, whose sums are added over ranks together."""

    def __init__(self) -> None:
        self.members: list[_Source] = []
        self.scales: dict[_Source, Tensor] = {}

    def scale(self, source: _Source, mesh: DeviceMesh, device: torch.device) -> Tensor:
        """γ ``[(experts,) matrices]`` from the shards as they are now.

        FSDP2 asks for every weight of a group once in each gathering. The first to ask computes for
        all, and each takes its own away: none is left for the next time.
        """
        if source not in self.scales:
            own = [member.sums(mesh) for member in self.members]
            sums = torch.cat([one.sum(-1).view(2, -1) for one in own], dim=1).to(device)
            dist.all_reduce(sums, group=mesh.get_group())
            parts = scale_of(sums).split([one[0, ..., 0].numel() for one in own])
            for member, part, one in zip(self.members, parts, own, strict=True):
                self.scales[member] = part.view(one.shape[1:-1])
        return self.scales.pop(source)


class MasterShard(Tensor):
    """A rank's rows of a master weight, gathered as two bits: ordinary values otherwise."""

    rows: Tensor
    source: _Source

    @staticmethod
    def __new__(cls, values: Tensor, source: _Source) -> MasterShard:
        made: MasterShard = Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), dtype=values.dtype, device=values.device
        )
        made.rows, made.source = values, source
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"MasterShard({self.rows})"

    def __tensor_flatten__(self) -> tuple[list[str], _Source]:
        return ["rows"], self.source

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], source: _Source, size: torch.Size, stride: tuple[int, ...]
    ) -> MasterShard:
        return MasterShard(inner["rows"], source)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*_values(args), **{k: _values(v) for k, v in (kwargs or {}).items()})
        if args and isinstance(own := args[0], MasterShard):
            if made is own.rows:  # in place
                return own
            if func in SHARDS:
                return MasterShard(made, own.source)
        return made

    # FSDP2 checks shapes of uneven shards against the float parameter's in its other signature.
    def fsdp_pre_all_gather(self, mesh: DeviceMesh) -> tuple[tuple[Tensor, ...], Tensor]:
        """This rank's rows in two bits, as many as of the first rank, and γ."""
        source = self.source
        module, values = source.module, self.rows
        scale = source.group.scale(source, mesh, values.device)
        length, first = source.place(mesh)
        own = scale[first : first + len(values)] if values.ndim == 3 else scale
        packed, _ = two_bits(values, module.pattern, module.method, source.local_sizes(mesh), own)
        missing = length - len(packed)
        if missing:
            packed = functional.pad(packed, [0, 0] * (packed.ndim - 1) + [0, missing])
        return (packed, scale.unsqueeze(0)), scale

    def fsdp_post_all_gather(
        self,
        outputs: tuple[Tensor, ...],
        metadata: Tensor,
        param_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """The gathered weight; later gatherings fill the same memory."""
        packed, *scales = outputs
        # Where a group has one rank, FSDP2 passes on only the first of what there is to gather.
        scale = scales[0][0] if scales else metadata
        if isinstance(out, GatheredTernary):
            out.scale = scale
            return None
        shape = self.source.shape
        return GatheredTernary(packed[: shape[0]], scale, shape, param_dtype), ()


# FSDP2 asks for it in every gathering, and Python builds it anew unless it is there.
_ask = MasterShard.fsdp_pre_all_gather
_ask.__signature__ = inspect.signature(_ask)  # type: ignore[attr-defined]


def _values(value: Any) -> Any:
    if isinstance(value, MasterShard):
        return value.rows
    if isinstance(value, list | tuple):
        return type(value)(_values(one) for one in value)
    return value


# What FSDP2, ``.to`` and ``to_empty`` make of a shard to put in its place.
SHARDS = {
    aten.detach.default,
    aten.alias.default,
    aten.slice.Tensor,
    aten.view.default,
    aten.new_zeros.default,
    aten.empty_like.default,
    aten.clone.default,
    aten._to_copy.default,
}
