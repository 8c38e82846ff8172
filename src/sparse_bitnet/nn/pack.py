"""Pack trained modules, and swap packed modules into a model."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparse_bitnet.core import ConfigError, WeightError, check_finite
from sparse_bitnet.formats import StorageName
from sparse_bitnet.kernels.matmul import unpacked
from sparse_bitnet.nn.derived import DerivedModule
from sparse_bitnet.nn.experts import why_not_experts
from sparse_bitnet.nn.packed_experts import PackedExperts
from sparse_bitnet.nn.packed_linear import PackedLinear
from sparse_bitnet.nn.packed_module import PackedModule, PackedSpec, find_violation


def packed_spec(module: DerivedModule, storage: StorageName, where: str) -> PackedSpec:
    """The :class:`PackedSpec` of a trained module.

    Raises:
        ConfigError: for a module that is not ternary, or not yet.
    """
    if not module.is_ternary:
        raise ConfigError(
            f"{where}: a {type(module).__name__} keeps full-precision weights and cannot be "
            "packed; convert the model with kind='bitnet'"
        )
    if module.blend is not None:
        raise ConfigError(
            f"{where}: quantization stands at {module.blend.item():.3g}, between full precision "
            "and ternary; train until it is 1, or pack what becomes of it then: "
            "set_quantization(model, 1)"
        )
    shard_sizes = getattr(module, "shard_sizes", ())  # experts have theirs by shape
    return PackedSpec(storage, module.pattern, module.method.activation_bits, shard_sizes)


def empty_packed(module: nn.Module, spec: PackedSpec, where: str) -> PackedModule:
    """An empty packed module, on the meta device, of the shape of a dense or trained one.

    Raises:
        ConfigError: if it is neither linear nor experts in transformers' usual form.
        PatternError: if M does not divide its input features.
    """
    if isinstance(module, nn.Linear):
        shape, bias = (module.in_features, module.out_features), module.bias is not None
        dtype = module.weight.dtype
        return PackedLinear(*shape, bias, spec=spec, where=where, device="meta", dtype=dtype)
    if reason := why_not_experts(module):
        raise ConfigError(f"{where}: these experts cannot be packed, because {reason}")
    down, act_fn = module.down_proj, module.act_fn
    assert isinstance(down, Tensor) and callable(act_fn)
    return PackedExperts(*down.shape, act_fn, spec=spec, where=where, device="meta")


def pack_module(module: DerivedModule, storage: StorageName, where: str) -> PackedModule:
    """The packed form of a trained module, on its device; the module stays as it is.

    Raises:
        ConfigError: as :func:`packed_spec`, and if the weight is sharded or not loaded.
        WeightError: if a master weight holds NaN, or a group breaks N:M.
    """
    spec = packed_spec(module, storage, where)
    packed = empty_packed(module, spec, where)
    for name, master in module.master_parameters().items():
        full = f"{where}.{name}"
        if isinstance(master, DTensor) or master.is_meta or master.numel() == 0:
            raise ConfigError(
                f"{full}: the weight is sharded or not loaded; gather the model first"
            )
        check_finite(master, full)
    for name, (ternary, scale) in derived_ternary(module).items():
        full = f"{where}.{name}"
        violation = find_violation(ternary, spec.pattern)
        if violation:
            raise WeightError(
                f"{full}: {violation}, but its pattern is {spec.pattern}; nothing was packed, "
                "give the module the pattern that it keeps"
            )
        packed.store(name, ternary, scale)
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor):
        check_finite(bias, f"{where}.bias")
        packed._buffers["bias"] = bias.detach()
    return packed


def swap_packed(model: nn.Module, specs: dict[str, PackedSpec]) -> None:
    """Put empty packed modules, on the meta device, in the place of the named modules.

    Raises:
        ConfigError: if the model has no such module, or it is none that can be packed.
        PatternError: if M does not divide a module's input features.
    """
    modules = dict(model.named_modules())
    for name, spec in specs.items():
        if name not in modules:
            raise ConfigError(f"{name}: the model has no such module")
        model.set_submodule(name, empty_packed(modules[name], spec, name))


def derived_ternary(module: DerivedModule) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight name → the ternary weight (int8) and scales that a trained module computes with now.

    Empty for the BF16 baseline.
    """
    if not module.is_ternary:
        return {}
    result = {}
    for name, master in module.master_parameters().items():
        ternary, scale, _ = module.derived(name)
        assert ternary is not None and scale is not None
        result[name] = unpacked(ternary, master.shape[-1]), scale
    return result
