"""Turn any Hugging Face causal language model into a Sparse-BitNet one, in place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparse_bitnet.console import say
from sparse_bitnet.core import (
    ConfigError,
    Method,
    Pattern,
    PatternError,
    check_finite,
    method_mask,
    zero_matrices,
)
from sparse_bitnet.nn.check import check_called
from sparse_bitnet.nn.derived import DerivedModule, whole
from sparse_bitnet.nn.experts import SparseBitExperts, SparseExperts, why_not_experts
from sparse_bitnet.nn.packed_module import StoredModule
from sparse_bitnet.nn.record import record, record_pattern
from sparse_bitnet.nn.sparse_bit_linear import SparseBitLinear
from sparse_bitnet.nn.sparse_linear import SparseLinear
from sparse_bitnet.nn.wrappers import check_adapters

Kind = Literal["bitnet", "bf16"]
LINEAR = {"bitnet": SparseBitLinear, "bf16": SparseLinear}
EXPERTS = {"bitnet": SparseBitExperts, "bf16": SparseExperts}

# Routers decide which expert sees a token: a handful of weights that a rounding would flip. Some
# architectures wrap the linear layer once more (`router.layer`, `gate.wg`). An indexer decides
# which tokens attention sees (DeepSeek V3.2), and no gradient would mend it.
ROUTERS = re.compile(r"(^|\.)(router|gate|shared_expert_gate|indexer)(\.|$)")

# transformers' classes with several logical matrices in one linear, one below the other.
FUSED_MLP = ("Phi3MLP", "GlmMLP", "Glm4MLP")
FUSED_ATTENTION = ("Phi3Attention",)


@dataclass
class Conversion:
    """Result of :func:`convert`. ``str()`` gives it in a line.

    Attributes:
        kind, pattern: as asked.
        modules: how many modules were swapped.
        weights: how many weights they hold.
        skipped: name → reason, for linear and expert modules left as they were.
        zero: matrices that are all zero, which a warning names too.
    """

    kind: Kind
    pattern: Pattern
    modules: int = 0
    weights: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    zero: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kept = f", {len(self.skipped)} left as they were" if self.skipped else ""
        return (
            f"{self.modules} modules with {self.weights:,} weights converted to {self.kind} "
            f"{self.pattern}{kept}"
        )


@dataclass(frozen=True)
class MasterWeight:
    """One master weight of a converted model.

    Attributes:
        name: of the parameter, as in ``named_parameters``.
        weight: ``[out, in]`` or ``[experts, out, in]``.
        module: the converted module that owns it.
        shard_sizes: rows of each logical matrix fused into ``out``.
    """

    name: str
    weight: nn.Parameter
    module: DerivedModule
    shard_sizes: tuple[int, ...]

    @property
    def pattern(self) -> Pattern:
        return self.module.pattern

    @property
    def mask(self) -> Tensor | None:
        """Which weights are kept now, boolean of the weight's shape; None if dense.

        Where the weight is sharded, every rank must ask.
        """
        with torch.no_grad():
            weight = whole(self.weight)
            return method_mask(weight, self.pattern, self.module.method, self.shard_sizes)


def convert(
    model: nn.Module,
    pattern: Pattern | str = "6:8",
    *,
    kind: Kind = "bitnet",
    method: Method | None = None,
    rules: dict[str, str] | None = None,
) -> Conversion:
    """Swap a model's linear layers (and mixture-of-experts weights) for Sparse-BitNet ones.

    Embeddings, the output head, norms and routers stay. Parameters are shared with the old
    modules, so an optimizer made before still holds them; those of another dtype become float32,
    because master weights are. The state dict keeps its keys. ``save_pretrained`` records what was
    done, so that ``from_pretrained`` gives the converted model again (see
    :mod:`sparse_bitnet.nn.record`). A model that is on the meta device as a whole gets modules
    without values; they come with ``to_empty`` and ``load_state_dict``.

    Args:
        model: any causal language model of transformers, or any module with ``nn.Linear`` in it.
        pattern: N:M, or ``"dense"``.
        kind: ``"bitnet"``, or ``"bf16"`` for the BF16 baseline with the same mask.
        method: the published method, or one of its ablations.
        rules: regular expression → pattern or ``"skip"``; the first that is found in a module's
            name decides for it, and every rule must decide for at least one module.

    Raises:
        ConfigError: for an unknown kind, a broken or unused rule, a model that is converted
            already, is packed, is sharded already, has adapters, has parameters whose values are
            elsewhere (ZeRO-3, offloading), or has nothing to convert. The model is then unchanged.
        ConfigError: likewise, if the architecture multiplies by a module's weight without calling
            the module (:mod:`sparse_bitnet.nn.check`); names the rule that leaves it out.
        PatternError: if M does not divide a module's input features, naming module and shape; then,
            too, the model is unchanged.
        WeightError: likewise, if a weight holds NaN or infinity, or overflows float32.
    """
    if kind not in LINEAR:
        raise ConfigError(f"convert: kind is {kind!r}; choose among {sorted(LINEAR)}")
    if any(isinstance(module, DerivedModule) for module in model.modules()):
        raise ConfigError("convert: the model is converted already; use set_pattern to change it")
    if any(isinstance(module, StoredModule) for module in model.modules()):
        raise ConfigError("convert: a packed model has no master weights; take the trained one")
    check_adapters(model, "convert")
    _check_values(model)
    Pattern.parse(pattern)
    rules = rules or {}
    _check_rules(rules)
    embeddings = _embeddings(model)
    chosen: dict[str, str | None] = {}
    skipped: dict[str, str] = {}
    unused = list(rules)
    for name, module in model.named_modules():
        if not _can_hold_masters(module):
            continue
        rule = next((rule for rule in rules if re.search(rule, name)), None)
        choice = None if rule is None else rules[rule]
        reason = _why_not(name, module, embeddings, choice)
        if reason is None:
            chosen[name] = choice
        else:
            skipped[name] = reason
        if rule in unused and (reason is None or choice == "skip"):
            unused.remove(rule)
    for rule in unused:
        _refuse_unused(rule, list(chosen), skipped)
    if "" in chosen:
        raise ConfigError(
            f"convert: the model is itself a {type(model).__name__}, so it cannot be swapped in "
            "place; put it into a module first"
        )
    if not chosen:
        reason = next(iter(skipped.values()), "")
        raise ConfigError(
            "convert: the model has no nn.Linear or expert weights to convert "
            f"({len(skipped)} were left out: {_some(list(skipped))})"
            + (f"; the first because {reason}" if reason else "")
        )
    report = convert_recorded(model, chosen, pattern, kind, method or Method(), rules)
    report.skipped = skipped
    return report


def convert_recorded(
    model: nn.Module,
    modules: dict[str, str | None],
    pattern: Pattern | str,
    kind: Kind,
    method: Method,
    rules: dict[str, str],
) -> Conversion:
    """Convert the modules that a record names, and no others (see :mod:`sparse_bitnet.nn.record`).

    Args:
        modules: their names in this model, each with the pattern that a rule gave it.

    Raises:
        AttributeError: if the model has no such module.
        ConfigError: if it is none that can be converted.
        PatternError: if M does not divide a module's input features.
    """
    report = Conversion(kind, Pattern.parse(pattern))
    own = {n: None if one is None else Pattern.parse(one) for n, one in modules.items()}
    for name, one in own.items():
        module = model.get_submodule(name)
        if not _can_hold_masters(module):
            raise ConfigError(f"{name} is a {type(module).__name__}")
        for parameter, weight in _weights(module):
            where = f"{name}.{parameter} {tuple(weight.shape)}"
            if isinstance(weight, DTensor):
                raise ConfigError(
                    f"convert: {where} is sharded already; convert first, then fully_shard"
                )
            (one or report.pattern).check_divides(weight.shape[-1], where)
            if not weight.is_meta:
                check_finite(weight.float(), where)
    check_called(model, own)
    places: dict[nn.Module, list[str]] = {}  # a module may stand in several
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(name)
    for name, one in own.items():
        module = model.get_submodule(name)
        for tensor in module.parameters(recurse=False):
            tensor.data = tensor.data.float()
        report.weights += sum(weight.numel() for _, weight in _weights(module))
        chosen = one or report.pattern
        new: DerivedModule = (
            LINEAR[kind](module, chosen, method, fused_rows(model, name))
            if isinstance(module, nn.Linear)
            else EXPERTS[kind](module, chosen, method)
        )
        new.own_pattern = one
        for place in places[module]:
            model.set_submodule(place, new)
        report.modules += 1
    written = {n: None if one is None else str(one) for n, one in own.items()}
    record(model, written, report.pattern, kind, method, rules)
    report.zero = [
        master.name + index
        for master in master_weights(model)
        if not master.weight.is_meta
        for index in zero_matrices(master.weight, master.shard_sizes)
    ]
    warn_of_zeros(report.zero)
    return report


def warn_of_zeros(names: list[str]) -> None:
    """Warn about matrices that are all zero."""
    if names:
        say(f"warning: {len(names)} matrices are all zero: {_some(names)}")


def set_pattern(model: nn.Module, pattern: Pattern | str) -> None:
    """Let all converted modules use another pattern from now on (a schedule's step).

    A module that a rule gave a pattern of its own uses that one whenever ``pattern`` is not dense.

    Raises:
        PatternError: if M does not divide a module's input features, naming the module; no module
            has changed then.
    """
    for module, one in patterns_of_modules(model, pattern).items():
        module.set_pattern(one)
    record_pattern(model, Pattern.parse(pattern))


def patterns_of_modules(model: nn.Module, pattern: Pattern | str) -> dict[DerivedModule, Pattern]:
    """What :func:`set_pattern` would give each module; changes nothing.

    Raises:
        PatternError: if M does not divide a module's input features, naming the module.
    """
    pattern = Pattern.parse(pattern)
    chosen = {
        module: pattern if pattern.is_dense else (module.own_pattern or pattern)
        for _, module in converted_modules(model)
    }
    for master in master_weights(model):
        shape = master.weight.shape
        chosen[master.module].check_divides(shape[-1], f"{master.name} {tuple(shape)}")
    return chosen


def converted_modules(model: nn.Module) -> Iterator[tuple[str, DerivedModule]]:
    """All converted modules with their names."""
    for name, module in model.named_modules():
        if isinstance(module, DerivedModule):
            yield name, module


def master_weights(model: nn.Module) -> Iterator[MasterWeight]:
    """All master weights of a converted model, in the order of its modules."""
    for name, module in converted_modules(model):
        for parameter, weight in module.master_parameters().items():
            full = f"{name}.{parameter}" if name else parameter
            yield MasterWeight(full, weight, module, module.shard_sizes_of(parameter))


def fused_rows(model: nn.Module, name: str) -> tuple[int, ...]:
    """Rows of each logical matrix that an architecture keeps in one linear; empty for one.

    Each of them has its own γ, as it has where q, k and v, or gate and up, are modules of their
    own. Known by the class around it, because other architectures interleave heads under the same
    names.
    """
    parent_name, _, attribute = name.rpartition(".")
    parent: Any = model.get_submodule(parent_name)
    linear = getattr(parent, attribute)
    if type(parent).__name__ in FUSED_MLP and attribute == "gate_up_proj":
        return (linear.out_features // 2,) * 2
    if type(parent).__name__ in FUSED_ATTENTION and attribute == "qkv_proj":
        rows = parent.head_dim * parent.config.num_key_value_heads
        return (linear.out_features - 2 * rows, rows, rows)
    return ()


def _can_hold_masters(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or any(w.dim() == 3 for _, w in _weights(module))


def _weights(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, w) for n, w in module.named_parameters(recurse=False) if n != "bias"]


def _check_values(model: nn.Module) -> None:
    """Refuse parameters whose values an engine keeps elsewhere."""
    meta = {name: parameter.is_meta for name, parameter in model.named_parameters()}
    # All on meta, and by nobody's hooks: a model's shape, which is converted without values.
    shape_only = all(meta.values()) and not hasattr(model, "hf_device_map")
    for name, parameter in model.named_parameters():
        if parameter.numel() == 0:
            raise ConfigError(
                f"convert: {name} {tuple(parameter.shape)} holds no values: an engine has "
                "partitioned it (DeepSpeed ZeRO-3, zero.Init). Gather the model first "
                "(deepspeed.zero.GatheredParameters), or convert it before it is partitioned"
            )
        if meta[name] and not shape_only:
            raise ConfigError(
                f"convert: {name} {tuple(parameter.shape)} is on the meta device: its values are "
                "offloaded or were never loaded. Load the model whole, without offloading "
                "(device_map), or materialize it first (to_empty, load_state_dict)"
            )


def _embeddings(model: nn.Module) -> set[Tensor]:
    """Weights of the input embeddings and of the output head."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    found: set[Tensor] = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    return found | (set(head.parameters()) if isinstance(head, nn.Module) else set())


def _why_not(
    name: str, module: nn.Module, embeddings: set[Tensor], choice: str | None
) -> str | None:
    """The reason to leave a module as it is, or None."""
    if choice == "skip":
        return "a rule skips it"
    if isinstance(module, nn.Conv1d):
        return "convolutions stay in full precision"
    if not isinstance(module, nn.Linear):
        return why_not_experts(module)
    if module.weight in embeddings:
        return "the output head stays in full precision"
    if type(module) is not nn.Linear:
        return f"it is a {type(module).__name__}, not a plain nn.Linear"
    return "routers and indexers stay in full precision" if ROUTERS.search(name) else None


def _check_rules(rules: dict[str, str]) -> None:
    for rule, value in rules.items():
        try:
            re.compile(rule)
            if value != "skip":
                Pattern.parse(value)
        except re.error as error:
            raise ConfigError(f"rule {rule!r} is not a regular expression: {error}") from None
        except PatternError as error:
            raise ConfigError(f"rule {rule!r}: {error}; or write 'skip'") from None


def _refuse_unused(rule: str, chosen: list[str], skipped: dict[str, str]) -> NoReturn:
    names = [*chosen, *skipped]
    found = [name for name in names if re.search(rule, name)]
    if not found:
        raise ConfigError(f"rule {rule!r} matches no linear module; there are {_some(names)}")
    reason = skipped.get(found[0], "")
    raise ConfigError(
        f"rule {rule!r} decides for no module: of {_some(found)} "
        + (f"the first is left out ({reason})" if reason else "an earlier rule decides")
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
