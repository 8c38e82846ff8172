"""One-shot N:M pruning of a model trained without a mask, and its cost in perplexity."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparse_bitnet.core import Pattern
from sparse_bitnet.data import open_source
from sparse_bitnet.evaluate import Perplexity, perplexity
from sparse_bitnet.nn import converted_modules, set_pattern


@dataclass(frozen=True)
class OneShot:
    """Perplexity of one text before and after masking. ``str()`` says it in a line."""

    pattern: str
    before: Perplexity
    after: Perplexity

    def __str__(self) -> str:
        return (
            f"perplexity {self.before.perplexity:.2f} before, {self.after.perplexity:.2f} with "
            f"{self.pattern} in one shot ({self.before.tokens:,} tokens)"
        )


def mask_one_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pattern: Pattern | str,
    text: str,
    *,
    window: int | None = None,
    limit: int | None = None,
) -> OneShot:
    """Give a converted model a pattern, and measure a text before and after.

    Of every group the N largest master weights are kept; γ stays that of the dense weight, as in
    training. Where magnitudes are equal, as in weights that were stored ternary, zeros go first and
    then those further right. Master weights are not changed: fine-tuning may bring any of them
    back, and another pattern may follow.

    Args:
        model: converted; its pattern is in force for the first measurement.
        tokenizer: the model's own.
        pattern: N:M, or ``"dense"``.
        text: a source such as ``text:PATH`` or ``jsonl:PATH``.
        window: tokens the model reads at once; see :func:`sparse_bitnet.evaluate.perplexity`.
        limit: score at most this many tokens.

    Raises:
        PatternError: if M does not divide a layer's input features; nothing has changed then.
        DataError: if there is no text.
    """
    pattern = Pattern.parse(pattern)
    for name, module in converted_modules(model):
        for weight in module.master_parameters().values():
            pattern.check_divides(weight.shape[-1], name)
    source = open_source(text)

    def measured(title: str) -> Perplexity:
        return perplexity(
            model, source, tokenizer=tokenizer, window=window, limit=limit, title=title
        )

    before = measured("perplexity before")
    set_pattern(model, pattern)
    return OneShot(str(pattern), before, measured(f"perplexity with {pattern}"))
