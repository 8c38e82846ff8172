"""From prepared directories to batches on the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_bitnet.core import ConfigError
from sparse_bitnet.data.loader import IGNORED, Batch, Loader
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
        self._device, self._ranks = ranks.device, ranks
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
        directory = Path(first) / "tokenizer"
        self.tokenizer = load_tokenizer(directory) if directory.is_dir() else None
        self.fingerprint: dict[str, Any] = {
            "tokenizer": train[first].tokenizer_hash,
            "tokens": [shards.total_tokens for shards in train.values()],
        }
        options: dict[str, Any] = {
            "sequence_length": data.sequence_length,
            "batch_size": data.batch_size,
            "rank": ranks.rank,
            "world_size": ranks.world_size,
            "separate_documents": data.separate_documents,
        }
        mixture = [(train[path], weight) for path, weight in directories.items()]
        self._train = Loader(mixture, seed=config.run.seed, **options)
        self.has_documents = self._train.has_documents
        self._validation = None
        self._validation_steps = 0
        if held and config.run.validation_sequences:
            mixture = [(held[path], directories[path]) for path in held]
            self._validation = Loader(mixture, seed=VALIDATION_SEED, **options)
            count = min(config.run.validation_sequences, sum(self._validation.windows))
            self._validation_steps = max(1, count // data.batch_size)

    def train(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step, on the device."""
        return list(self._micro_batches([self._train.batch(step)]))

    def validation(self) -> Iterator[Batch]:
        """This rank's validation micro-batches; none if there is no validation split."""
        if self._validation is not None:
            steps = range(self._validation_steps)
            yield from self._micro_batches(map(self._validation.batch, steps))

    def _micro_batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Cut and moved to the device. Where only some labels are learned, they are divided by the
        mean over micro-batches and ranks of how many: then the mean of the losses is that over all
        labels."""
        parts: Iterable[Batch] = (part for batch in batches for part in batch.split(self._micro))
        divisor = None
        if self.has_documents:
            parts = list(parts)
            learned = torch.stack([(part.labels != IGNORED).sum() for part in parts])
            divisor = self._ranks.mean(learned.float().mean().to(self._device))
        for part in parts:
            yield part.map(self._to_device)._replace(divisor=divisor)

    def _to_device(self, tokens: Tensor) -> Tensor:
        if self._device.type != "cuda":
            return tokens
        return tokens.pin_memory().to(self._device, non_blocking=True)


def _open(directories: Iterable[str]) -> tuple[dict[str, TokenShards], dict[str, TokenShards]]:
    """The training splits, and the validation splits that there are."""
    train = {path: TokenShards(Path(path) / "train") for path in directories}
    held = [path for path in directories if (Path(path) / "validation").is_dir()]
    return train, {path: TokenShards(Path(path) / "validation") for path in held}
