"""Sampling of the next token, reproducible wherever the logits were computed.

Each sequence draws from a generator of its own, so that a seed repeats beside other requests. What
can differ is the last bit of a logit: float sums depend on how many sequences are computed at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingOptions:
    """OpenAI's options of a request."""

    max_tokens: int  # an answer has at most so many
    temperature: float = 0.0  # 0 takes the likeliest token
    top_p: float = 1.0  # draw among the likeliest tokens that together have this probability
    seed: int = 0  # of the draws
    # taken from the logit of each token that the answer has already; the second once for each time
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    # token id → what is added to its logit
    logit_bias: dict[int, float] = field(default_factory=dict)
    # log-probabilities of the chosen token and of so many likeliest; None for none
    logprobs: int | None = None
    matcher: Any = None  # llguidance's, which says what tokens may follow; its state stays as it is


@dataclass(frozen=True)
class Token:
    """A chosen token: its id, its log-probability if asked for, and the likeliest ids with theirs.

    Log-probabilities are the model's own, before penalties, bias and temperature.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one sequence, one after the other."""

    def __init__(self, options: SamplingOptions) -> None:
        self.options = options
        self._counts: dict[int, int] = {}
        self._generator: torch.Generator | None = None
        self._matcher = options.matcher.deep_copy() if options.matcher else None

    @property
    def is_argmax(self) -> bool:
        """True if the token is the one with the largest logit, and nothing else is asked for."""
        o = self.options
        return (
            o.temperature == 0
            and o.logprobs is None
            and o.matcher is None
            and not (o.presence_penalty or o.frequency_penalty or o.logit_bias)
        )

    @property
    def is_complete(self) -> bool:
        """True if nothing may follow, by the grammar."""
        return self._matcher is not None and bool(self._matcher.is_stopped())

    def choose(self, logits: Tensor) -> Token:
        """The next token by its logits: float32 ``[vocabulary]``, which are not changed.

        Raises:
            RuntimeError: if the grammar lets no token follow, or takes too long to say which.
        """
        o = self.options
        scores = self._changed(logits)
        if self._matcher is not None:
            allowed = torch.frombuffer(
                bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8
            )
            scores = scores.masked_fill(allowed.to(scores.device) == 0, -torch.inf)
        token = int(self._draw(scores) if o.temperature > 0 else scores.argmax())
        if self._matcher is not None and not self._matcher.consume_token(token):
            raise RuntimeError(f"the grammar: {self._matcher.get_error()[:300]}")
        self._counts[token] = self._counts.get(token, 0) + 1
        if o.logprobs is None:
            return Token(token)
        logs = logits.log_softmax(-1)
        values, ids = logs.topk(min(o.logprobs, len(logs)))
        return Token(
            token, float(logs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True))
        )

    def _changed(self, logits: Tensor) -> Tensor:
        o = self.options
        changes = dict(o.logit_bias)
        if o.presence_penalty or o.frequency_penalty:
            for token, count in self._counts.items():
                penalty = o.presence_penalty + o.frequency_penalty * count
                changes[token] = changes.get(token, 0.0) - penalty
        if not changes:
            return logits
        ids = torch.tensor(list(changes), device=logits.device)
        values = torch.tensor(list(changes.values()), device=logits.device, dtype=logits.dtype)
        return logits.index_add(0, ids, values)

    def _draw(self, scores: Tensor) -> Tensor:
        if self._generator is None:
            self._generator = torch.Generator(scores.device).manual_seed(self.options.seed)
        probabilities = (scores / self.options.temperature).softmax(-1)
        if self.options.top_p < 1:
            ordered, ids = probabilities.sort(descending=True)
            outside = ordered.cumsum(-1) - ordered >= self.options.top_p
            probabilities = probabilities.index_fill(0, ids[outside], 0.0)
        return torch.multinomial(probabilities, 1, generator=self._generator)
