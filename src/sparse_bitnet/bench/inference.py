"""Prefill and decode of whole models: BF16, dense BitNet, 6:8 and 2:4, in one process, in turns.

All have the shape of the same preset and random weights, and run in the package's own decoder. On a
GPU its layers are compiled one by one, its cache is static, and a pass is one CUDA graph; on a CPU
a token takes the native call. Everything is in the time: embedding, norms, activation quantization,
lifting, products, scales, attention, the output head for the last token.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparse_bitnet import console
from sparse_bitnet.bench.random_decoder import compile_parts, random_decoder
from sparse_bitnet.bench.timing import interleaved
from sparse_bitnet.core import Pattern
from sparse_bitnet.modeling import DecoderForCausalLM, KeyValueCache, StaticKeyValueCache
from sparse_bitnet.modeling.decoder import FULL as FULL_ATTENTION
from sparse_bitnet.nn.packed_linear import PackedLinear

FULL = "bf16"
KINDS = (FULL, "dense", "6:8", "2:4")
SMALLEST_MARGIN = 64  # free slots of a decode's cache


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        stage: ``prefill`` or ``decode``.
        batch: sequences.
        length: tokens of each prompt; of a decode, tokens already in the cache.
        head: ``bf16`` or ``int8``.
    """

    stage: str
    batch: int
    length: int
    head: str = "bf16"

    @property
    def tokens(self) -> int:
        """That one pass works on."""
        return self.batch * (self.length if self.stage == "prefill" else 1)

    def __str__(self) -> str:
        what = f"{self.batch} × {self.length}" if self.stage == "prefill" else f"batch {self.batch}"
        return f"{self.stage} {what}" + (", int8 head" if self.head != "bf16" else "")


@dataclass
class Row:
    """A measured case.

    Attributes:
        microseconds: kind → all repeats.
        backends: kind → layer → what served it.
        problem: kind → why it was not measured.
    """

    preset: str
    case: Case
    microseconds: dict[str, list[float]] = field(default_factory=dict)
    backends: dict[str, dict[str, str]] = field(default_factory=dict)
    problem: dict[str, str] = field(default_factory=dict)

    def median(self, kind: str) -> float:
        """Microseconds; raises KeyError for a kind without a measurement."""
        return statistics.median(self.microseconds[kind])

    def rate(self, kind: str) -> float:
        """Tokens a second; raises KeyError for a kind without a measurement."""
        return self.case.tokens * 1e6 / self.median(kind)

    def told(self, kind: str) -> str:
        """Tokens a second, and how many times BF16's, for people; ``-`` without a measurement."""
        if kind not in self.microseconds:
            return "-"
        over = self.ratio(kind, FULL)
        beside = f" ({over:.2f}×)" if over is not None and kind != FULL else ""
        return f"{self.rate(kind):,.0f}{beside}"

    def ratio(self, kind: str, over: str) -> float | None:
        """How many times faster than another kind; None if one of them was not measured."""
        if kind not in self.microseconds or over not in self.microseconds:
            return None
        return self.median(over) / self.median(kind)

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return {
            "model": self.preset,
            "stage": self.case.stage,
            "batch": self.case.batch,
            "length": self.case.length,
            "head": self.case.head,
            "tokens_per_second": {k: self.rate(k) for k in self.microseconds},
            "over_bf16": {k: self.ratio(k, FULL) for k in self.microseconds},
            "over_dense": {k: self.ratio(k, "dense") for k in self.microseconds},
            "microseconds": {
                k: {"median": self.median(k), "all": [round(t, 1) for t in times]}
                for k, times in self.microseconds.items()
            },
            "backends": self.backends,
            "problem": self.problem,
        }

    def __str__(self) -> str:
        parts = [f"{kind} {self.told(kind)}" for kind in self.microseconds]
        parts += [f"{kind}: {why}" for kind, why in self.problem.items()]
        return f"{self.preset} {self.case!s:28} tokens/s: " + "  ".join(parts)


def measure(
    preset: str,
    cases: list[Case],
    *,
    kinds: tuple[str, ...] = KINDS,
    repeats: int = 9,
    layers: int | None = None,
    vocabulary: int | None = None,
    compiled: bool = True,
) -> Iterator[Row]:
    """Time the cases of one model shape.

    Args:
        preset: a key of :data:`sparse_bitnet.train.presets.PRESETS`.
        cases: in order.
        kinds: ``bf16``, and patterns of ternary models.
        repeats: of every kind, in turns.
        layers, vocabulary: for a smaller model than the preset's.
        compiled: compile the layers; without, everything around the products runs eagerly.

    Yields:
        A row for each case as soon as it is measured.

    Raises:
        ConfigError, PatternError: as :func:`~sparse_bitnet.bench.random_decoder.random_decoder`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch._dynamo.config.recompile_limit = 256  # one graph a shape
    with torch.no_grad(), console.progress(f"{preset}, {device}", len(cases)) as task:
        for head in dict.fromkeys(case.head for case in cases):
            decoders = {}
            for kind in kinds:
                pattern = None if kind == FULL else Pattern.parse(kind)
                decoders[kind] = random_decoder(
                    preset,
                    pattern,
                    head="bf16" if kind == FULL else head,
                    layers=layers,
                    vocabulary=vocabulary,
                    device=device,
                    dtype=dtype,
                )
                if compiled:
                    compile_parts(decoders[kind])
            for case in (case for case in cases if case.head == head):
                yield _measure(preset, case, decoders, repeats)
                task.advance()
            del decoders
            _free()


def _measure(preset: str, case: Case, decoders: dict[str, DecoderForCausalLM], repeats: int) -> Row:
    row = Row(preset, case)
    calls: dict[str, list[Callable[[], object]]] = {}
    for kind, decoder in decoders.items():
        try:
            row.backends[kind] = backends(decoder)
            call = call_of(decoder, case)
            call()  # compiles
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
            row.problem[kind] = str(error).strip().splitlines()[0][:200]
            continue
        calls[kind] = [call]
    if calls:
        row.microseconds = interleaved(calls, repeats)
    calls.clear()
    _free()
    return row


def call_of(decoder: DecoderForCausalLM, case: Case) -> Callable[[], Tensor]:
    """One pass of the case, ready to be called again and again: logits of the last tokens."""
    width = case.length if case.stage == "prefill" else 1
    vocabulary = decoder.config.vocab_size
    tokens = torch.randint(0, vocabulary, (case.batch, width), device=decoder.device)
    if case.stage == "prefill":
        return partial(_prefill, decoder, tokens)
    if decoder.device.type == "cuda":
        return partial(_static_step, decoder, tokens, _static_cache(decoder, case), case.length)
    return partial(_step, decoder, tokens, _cache(decoder, case))


def _prefill(decoder: DecoderForCausalLM, tokens: Tensor) -> Tensor:
    # Prompts of one length: no mask, and none to be looked for.
    found = decoder(
        tokens, attention_mask={FULL_ATTENTION: None}, use_cache=False, logits_to_keep=1
    )
    logits: Tensor = found.logits
    return logits


def _static_step(
    decoder: DecoderForCausalLM, tokens: Tensor, cache: StaticKeyValueCache, length: int
) -> Tensor:
    """A token after ``length`` others, whose position is a tensor, as a CUDA graph wants it."""
    cache.position.fill_(length)
    slots = torch.arange(cache.length, device=tokens.device)
    logits: Tensor = decoder(
        tokens,
        attention_mask={FULL_ATTENTION: (slots <= cache.position).view(1, 1, 1, -1)},
        position_ids=cache.position.view(1, 1),
        past_key_values=cache,
    ).logits
    return logits


def _step(decoder: DecoderForCausalLM, tokens: Tensor, cache: KeyValueCache) -> Tensor:
    """A token after those in the cache, which is then as before."""
    logits: Tensor = decoder(tokens, past_key_values=cache).logits
    cache.crop(-1)
    return logits


def _static_cache(decoder: DecoderForCausalLM, case: Case) -> StaticKeyValueCache:
    """Random keys and values, with some free slots."""
    cache = StaticKeyValueCache(
        decoder.config, case.batch, case.length + SMALLEST_MARGIN, decoder.dtype, decoder.device
    )
    layers: Any = cache.layers
    for layer in layers:
        layer.keys.normal_()
        layer.values.normal_()
    return cache


def _cache(decoder: DecoderForCausalLM, case: Case) -> KeyValueCache:
    """Random keys and values."""
    cache, attention = KeyValueCache(decoder.config), decoder.model.layers[0].self_attn
    shape = (case.batch, attention.kv_heads, case.length, attention.head_dim)
    for index in range(len(cache.layers)):
        keys, values = torch.randn(2, *shape, dtype=decoder.dtype)
        cache.update(keys, values, index)
    return cache


def backends(decoder: DecoderForCausalLM) -> dict[str, str]:
    """What serves each product of a layer."""
    return {
        name: module.layout("weight").backend
        for name, module in decoder.model.layers[0].named_modules()
        if isinstance(module, PackedLinear)
    }


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
