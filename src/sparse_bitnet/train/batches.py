"""From prepared directories to batches on the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparse_bitnet.core import ConfigError
from sparse_bitnet.data.loader import Loader
from sparse_bitnet.data.shards import TokenShards
from sparse_bitnet.data.tokenizer import load_tokenizer
from sparse_bitnet.train.config import TrainConfig
from sparse_bitnet.train.parallel import Ranks

VALIDATION_SEED = 0  # every run of every seed is measured on the same sequences


class Batches:
    """The token batches of a run: training by step, and a fixed set for validation.

    Raises:
        ConfigError: if the ranks do not divide the batch.
        DataError: if a directory is missing or damaged, or the tokenizers of a mixture differ.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks) -> None:
        data = config.data
        if data.batch_size % ranks.world_size:
            raise ConfigError(
                f"data.batch_size is {data.batch_size}: it must be a multiple of the "
                f"{ranks.world_size} ranks"
            )
        self._device = ranks.device
        local = data.batch_size // ranks.world_size
        self._micro = min(data.micro_batch_size or local, local)
        if local % self._micro:
            raise ConfigError(
                f"data.micro_batch_size is {self._micro}: it must divide the {local} sequences of "
                f"each of {ranks.world_size} ranks"
            )
        directories = data.mixture or {data.path: 1.0}
        train, held = ranks.first_alone(lambda: _open(directories))  # it reads them all, once
        first = next(iter(directories))
        self.vocab_size = train[first].vocab_size
        self.tokenizer = _tokenizer(Path(first) / "tokenizer")
        self.fingerprint: dict[str, Any] = {
            "tokenizer": train[first].tokenizer_hash,
            "tokens": [shards.total_tokens for shards in train.values()],
        }
        place = {"rank": ranks.rank, "world_size": ranks.world_size}
        size = (data.sequence_length, data.batch_size)
        mixture = [(train[path], weight) for path, weight in directories.items()]
        self._train = Loader(mixture, *size, seed=config.run.seed, **place)
        self._validation = None
        self._validation_steps = 0
        if held and config.run.validation_sequences:
            mixture = [(held[path], directories[path]) for path in held]
            self._validation = Loader(mixture, *size, seed=VALIDATION_SEED, **place)
            count = min(config.run.validation_sequences, sum(self._validation.windows))
            self._validation_steps = max(1, count // data.batch_size)

    def train(self, step: int) -> list[Tensor]:
        """This rank's micro-batches of a step: ``[micro, length + 1]`` on the device."""
        return self._to_device(self._train.batch(step))

    def validation(self) -> Iterator[Tensor]:
        """This rank's validation micro-batches; none if there is no validation split."""
        if self._validation is not None:
            for step in range(self._validation_steps):
                yield from self._to_device(self._validation.batch(step))

    def _to_device(self, batch: Tensor) -> list[Tensor]:
        if self._device.type == "cuda":
            batch = batch.pin_memory().to(self._device, non_blocking=True)
        return list(batch.split(self._micro))


def _open(directories: Iterable[str]) -> tuple[dict[str, TokenShards], dict[str, TokenShards]]:
    """The training splits, and the validation splits that there are."""
    train = {path: TokenShards(Path(path) / "train") for path in directories}
    held = [path for path in directories if (Path(path) / "validation").is_dir()]
    return train, {path: TokenShards(Path(path) / "validation") for path in held}


def _tokenizer(directory: Path) -> PreTrainedTokenizerBase | None:
    if not directory.is_dir():
        return None
    return load_tokenizer(directory)
