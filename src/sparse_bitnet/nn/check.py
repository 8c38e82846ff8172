"""Check by a forward pass of a few tokens that a model computes with its converted modules.

Some architectures multiply by a layer's weight without calling the layer: Mamba's ``dt_proj``
always, its ``out_proj`` where a fused kernel takes the weight. Converted, such a layer would train
dense and be packed as ternary. No list of names finds them all, but a forward pass does: the
module around the layer is called, and the layer is not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sparse_bitnet.core import ConfigError, WeightError
from sparse_bitnet.formats import StorageName
from sparse_bitnet.nn.derived import DerivedModule
from sparse_bitnet.nn.pack import pack_module

CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # never called themselves
TOLERANCE = 2.0**-7
"""Of the largest output: two roundings to bfloat16."""


def check_called(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Refuse modules that a forward pass leaves out although it calls the module around them.

    One pass in training and one in evaluation mode, of a few tokens, without gradients; random
    numbers and modes stay as they were. Models that do not run on token ids alone, or not on their
    present device (meta tensors have no numbers to decide by), pass unseen.

    Args:
        names: of the modules to look at; the converted ones when left out.

    Raises:
        ConfigError: naming the modules and the rules that leave them in full precision.
    """
    if not hasattr(model, "dummy_inputs"):  # of transformers; nobody knows what others take
        return
    if names is None:
        names = [n for n, m in model.named_modules() if isinstance(m, DerivedModule)]
    names, missed = list(names), set[str]()
    for training in (True, False):
        try:
            missed |= _left_out(model, names, training)
        except Exception:  # whatever an architecture raises that wants other inputs
            continue
    if missed:
        first = min(missed, key=names.index)
        rules = sorted({rf"\.{re.escape(name.rpartition('.')[2])}$" for name in missed})
        raise ConfigError(
            f"{first}{f' and {len(missed) - 1} more' if len(missed) > 1 else ''}: "
            f"{type(_caller(model, first)).__name__} reads the weight without calling the module, "
            "which would train in full precision and be packed as ternary; leave it as it is by "
            + " and ".join(f"the rule '{rule}: skip'" for rule in rules)
        )


def check_packed(model: nn.Module, storage: StorageName) -> None:
    """Compare every converted module with its packed form, on what it gets in a forward pass.

    One module is packed at a time, so memory hardly grows.

    Raises:
        ConfigError: as :func:`check_called`, and if the model does not run on a few token ids.
        WeightError: as ``pack_module``, and naming the module whose packed form gives something
            else.
    """
    check_called(model)

    def compare(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
            packed = pack_module(module, storage, name)(*args, **kwargs)
            if not output.isfinite().all():
                return  # what is written is checked tensor by tensor, and named
            error, largest = (packed.float() - output.float()).abs().max(), output.abs().max()
            if not error <= TOLERANCE * largest:
                raise WeightError(
                    f"{name}: the packed layer differs from the trained one by up to {error:.3g} "
                    f"of {largest:.3g}, so it computes something else in the model than its weight "
                    "says (a hook, a wrapper or a forward of its own?); nothing was packed"
                )

        return hook

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, DerivedModule):
                handle = module.register_forward_hook(compare(name), with_kwargs=True)
                hooks.callback(handle.remove)
        try:
            _run(model, training=False)
        except (ConfigError, WeightError):
            raise
        except Exception as error:
            raise ConfigError(
                f"pack: the model does not run on a few token ids ({type(error).__name__}: "
                f"{str(error)[:200]}), so it cannot be compared with the packed one; check=False "
                "(--no-check) packs it all the same"
            ) from error


def _left_out(model: nn.Module, names: list[str], training: bool) -> set[str]:
    called: set[nn.Module] = set()
    with ExitStack() as hooks:
        for module in model.modules():
            handle = module.register_forward_pre_hook(lambda module, _: called.add(module))
            hooks.callback(handle.remove)
        _run(model, training)
    modules = dict(model.named_modules())
    return {n for n in names if modules[n] not in called and _caller(model, n) in called}


def _caller(model: nn.Module, name: str) -> nn.Module:
    """The module whose forward would call the named one."""
    while True:
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
        if not (name and isinstance(module, CONTAINERS)):
            return module


def _run(model: nn.Module, training: bool) -> None:
    like: Any = model  # a PreTrainedModel, whose module imports this package and cannot be named
    inputs = {name: value.to(like.device) for name, value in like.dummy_inputs.items()}
    cuda = [like.device] if like.device.type == "cuda" else []
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng(cuda),
            torch.compiler.set_stance("force_eager"),
        ):
            model(**inputs, use_cache=False)
    finally:
        for module, mode in before.items():
            module.training = mode
