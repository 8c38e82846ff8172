"""Log-probabilities of given tokens, in batches that fit the memory at hand.

The one thing that every measurement here needs. At a vocabulary of 151,936 the logits of 16,384
tokens take 10 GB in float32, so the model's body runs over a whole batch, and its head over as many
of the wanted positions at a time as make a bounded number of logits.

Inputs of one batch may have different lengths: they are padded on the right, where a causal model
cannot see the padding, so no attention mask is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from sparse_bitnet.console import say
from sparse_bitnet.core import ConfigError, WeightError
from sparse_bitnet.train.model import context_length

# Larger batches gain nothing on a CPU; a GPU needs many tokens to be busy, and can halve them.
TOKENS_AT_ONCE = {"cpu": 2**12, "cuda": 2**17}
LOGITS_AT_ONCE = {"cpu": 2**24, "cuda": 2**27}  # elements: 64 and 512 MB in float32
DEFAULT_WINDOW = 1024


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module gets its own mode back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def vocabulary(model: PreTrainedModel) -> int:
    """How many token ids the model has embeddings for."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]


def default_window(config: PreTrainedConfig) -> int:
    """1024 tokens, or fewer where a model's configuration has fewer positions."""
    return min(DEFAULT_WINDOW, context_length(config) or DEFAULT_WINDOW)


def check_window(model: PreTrainedModel, window: int | None) -> int:
    """Tokens the model reads at once: as given, or :func:`default_window`.

    Raises:
        ConfigError: if it is below 1 or longer than the model's positions.
    """
    if window is None:
        return default_window(model.config)
    positions = context_length(model.config)
    if window < 1 or (positions and window > positions):
        raise ConfigError(
            f"--window {window} is out of range: the model reads 1 to "
            f"{positions or 'any number of'} tokens at once"
        )
    return window


def choose_batch(
    model: PreTrainedModel, window: int, plain_head: bool, given: int | None = None
) -> int:
    """Rows of ``window`` tokens to begin with: as given, else by device, and by the logits where
    those of all positions are kept.

    Raises:
        ConfigError: if fewer than one is given.
    """
    if given is not None:
        if given < 1:
            raise ConfigError(f"--batch-size {given} is out of range: 1 or more, or leave it out")
        return given
    kind = "cuda" if model.device.type == "cuda" else "cpu"
    tokens = TOKENS_AT_ONCE[kind]
    if not plain_head:
        tokens = min(tokens, LOGITS_AT_ONCE[kind] // vocabulary(model))
    return max(1, tokens // window)


def in_batches(count: int, batch: int, work: Callable[[int, int], None]) -> None:
    """Call ``work(start, end)`` over ``range(count)``, with half the batch when memory runs out.

    ``work`` must leave nothing behind when it fails.

    Raises:
        ConfigError: if memory does not suffice for a single row.
    """
    start = 0
    while start < count:
        end = min(start + batch, count)
        try:
            work(start, end)
        except torch.OutOfMemoryError as error:
            if batch == 1:
                raise ConfigError(
                    f"a single window does not fit into the device's memory ({error}); use a "
                    "shorter window"
                ) from error
            batch //= 2
        else:
            start = end
            continue
        # Outside the handler: the exception's frames, and the tensors in them, are gone.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        say(f"out of memory: going on with a batch of {batch}")


def token_log_probabilities(
    model: PreTrainedModel, inputs: Tensor, targets: Tensor, wanted: Tensor, plain_head: bool
) -> Tensor:
    """log p(target | the inputs up to its position), in nats.

    Args:
        inputs: int64 ``[rows, length]``, padded on the right.
        targets: int64 ``[rows, length]``, the token that follows each input.
        wanted: bool ``[rows, length]``, which positions to score.
        plain_head: see :mod:`sparse_bitnet.nn.head`; otherwise all logits of the batch are kept.

    Returns:
        float64 ``[number wanted]`` on the CPU, row by row. The softmax is taken in float32.

    Raises:
        WeightError: if a log-probability is not finite.
    """
    device = model.device
    inputs, wanted = inputs.to(device), wanted.to(device)
    labels = targets.to(device)[wanted]
    if plain_head:
        features = model.base_model(input_ids=inputs, use_cache=False).last_hidden_state[wanted]
        head = model.get_output_embeddings()
    else:
        features = model(input_ids=inputs, use_cache=False).logits[wanted]
        head = nn.Identity()
    rows = max(1, LOGITS_AT_ONCE["cuda" if device.type == "cuda" else "cpu"] // vocabulary(model))
    parts = zip(features.split(rows), labels.split(rows), strict=True)
    losses = [nn.functional.cross_entropy(head(x).float(), y, reduction="none") for x, y in parts]
    result = -torch.cat(losses).double().cpu()
    if not result.isfinite().all():
        raise WeightError(
            f"the model's log-probabilities of {int((~result.isfinite()).sum())} of {len(result)} "
            f"tokens are not finite: its weights are damaged, training diverged, or its dtype "
            f"({model.dtype}) overflows; take an earlier checkpoint, or load it in float32"
        )
    return result
