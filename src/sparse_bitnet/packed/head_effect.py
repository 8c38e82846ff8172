"""Perplexity of a packed model with its int8 head and with the float head."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from sparse_bitnet.evaluate import Measurements, Perplexity, measure
from sparse_bitnet.nn.int8_head import Int8Embedding, TiedInt8Head
from sparse_bitnet.packed.load import load_with_tokenizer
from sparse_bitnet.train.export import load_master


@dataclass(frozen=True)
class HeadEffect:
    """Perplexities by what they were measured on; ``str()`` is a line for each.

    Attributes:
        float_head: with the head as it was trained.
        int8_head: with the head as it is stored.
        dtype: of the float head.
    """

    float_head: dict[str, Perplexity]
    int8_head: dict[str, Perplexity]
    dtype: str

    def __str__(self) -> str:
        lines = []
        for name, was in self.float_head.items():
            now = self.int8_head[name]
            change = now.perplexity / was.perplexity - 1
            lines.append(
                f"perplexity on {name}: {was.perplexity:.3f} with the head in {self.dtype}, "
                f"{now.perplexity:.3f} in int8 ({change:+.3%}), over {now.tokens:,} tokens"
            )
        return "\n".join(lines)


def head_effect(source: str | Path, directory: str | Path, wanted: Measurements) -> HeadEffect:
    """Measure a packed model with an int8 head, then with the head of its trained source.

    Args:
        source: the trained directory.
        directory: what it was packed to with ``head="int8"``.
        wanted: shards or text, window, limit.

    Raises:
        DataError: for shards or text that are missing, damaged or of another vocabulary.
        CheckpointError, PackedFormatError: if a directory is damaged.
    """
    model, tokenizer = load_with_tokenizer(directory)
    int8 = measure(model, tokenizer, wanted)
    trained, _, _ = load_master(source)
    names = {module: name for name, module in model.named_modules()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    table = head.table if isinstance(head, TiedInt8Head) else head
    weight = trained.get_output_embeddings().weight.detach().to(model.device, model.dtype)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if table.bias is not None:
        linear.bias = nn.Parameter(table.bias, requires_grad=False)
    model.set_submodule(names[head], linear)
    if isinstance(embedding, Int8Embedding):
        restored = nn.Embedding.from_pretrained(weight)
        model.set_submodule(names[embedding], restored)
    full = measure(model, tokenizer, wanted)

    def found(report: object) -> dict[str, Perplexity]:
        both = {name: getattr(report, name) for name in ("shards", "text")}
        return {name: value for name, value in both.items() if value is not None}

    return HeadEffect(found(full), found(int8), str(model.dtype).removeprefix("torch."))
