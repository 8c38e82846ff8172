"""Errors of this package. Each message names the thing, the place and the remedy."""

from reprlib import Repr

LONGEST_SHOWN = 300
LONGEST_MESSAGE = 1000
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = 10
_SHORT.maxlevel = 3


class SparseBitNetError(Exception):
    """Base of every error that this package raises on purpose.

    A message quotes files, requests and other libraries, which have no bound: beyond
    ``LONGEST_MESSAGE`` its middle is left out, so that the place and the remedy stay.
    """

    def __init__(self, message: str = "") -> None:
        if len(message) > LONGEST_MESSAGE:
            half = LONGEST_MESSAGE // 2
            message = f"{message[:half]} … {message[-half + 3 :]}"
        super().__init__(message)


class PatternError(SparseBitNetError, ValueError):
    """A sparsity pattern is malformed, or does not fit the weight it is applied to."""


class WeightError(SparseBitNetError, ValueError):
    """A weight tensor is not what the operation needs (NaN, wrong dtype, breaks its pattern)."""


class ConfigError(SparseBitNetError, ValueError):
    """A configuration value or key is unknown, out of range or contradicts another."""


class DataError(SparseBitNetError):
    """A text source, shard or index is missing, damaged or does not match its consumer."""


class CheckpointError(SparseBitNetError):
    """A training checkpoint is missing, damaged or belongs to another run."""


class TrainingError(SparseBitNetError):
    """Training cannot go on, for example because the loss is not finite."""


class PackedFormatError(SparseBitNetError):
    """A packed model is truncated, edited, or not one of ours."""


class OutputError(SparseBitNetError, OSError):
    """A file or directory cannot be written, or something appeared in its place meanwhile."""


class MissingExtraError(SparseBitNetError, ImportError):
    """An optional dependency is not installed; the message holds the pip command."""


class BackendError(SparseBitNetError, RuntimeError):
    """No backend serves this device, dtype and shape, or the one asked for cannot."""


def shown(value: object) -> str:
    """A value from a file for a message: its ``repr``, or the beginning of it.

    Never made whole first: a few lines of YAML that refer to each other stand for gigabytes.
    """
    try:
        text = _SHORT.repr(value)
    except (ValueError, RecursionError):  # an integer with more digits than Python prints
        return f"a long {type(value).__name__}"
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 1]}…"
