"""Errors of this package. Each message names the thing, the place and the remedy."""


class SparseBitNetError(Exception):
    """Base of every error that this package raises on purpose."""


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


class MissingExtraError(SparseBitNetError, ImportError):
    """An optional dependency is not installed; the message holds the pip command."""


class BackendError(SparseBitNetError, RuntimeError):
    """No backend serves this device, dtype and shape, or the one asked for cannot."""
