"""Prefill and decode speed of whole models with random weights: BF16, dense BitNet, 6:8 and 2:4.

The verb ``bench``, and benchmarks/inference.py. All models have the shape of one preset and run in
the package's own decoder, in one process, in turns. On a GPU its layers are compiled one by one,
its cache is static, and a pass is one CUDA graph; on a CPU a token takes the native call.
Everything is in the time: embedding, norms, quantization of activations, products, scales,
attention, the output head for the last token.
"""

from __future__ import annotations

import gc
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_bitnet import console, files
from sparse_bitnet.bench.harness import FP8, FULL, Calls, compile_parts, interleaved, random_decoder
from sparse_bitnet.core import ConfigError
from sparse_bitnet.kernels import native
from sparse_bitnet.kernels.environment import cpu_name, measured_on
from sparse_bitnet.modeling import DecoderForCausalLM, KeyValueCache, StaticKeyValueCache
from sparse_bitnet.modeling.decoder import FULL as FULL_ATTENTION
from sparse_bitnet.nn.packed_linear import PackedLinear

KINDS = (FULL, "dense", "6:8", "2:4")
FREE_SLOTS = 64  # of a decode's cache
SMALL_LAYERS, SMALL_VOCABULARY = 2, 4096  # without a GPU


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        stage: ``prefill`` or ``decode``.
        batch: sequences.
        length: tokens of each prompt; of a decode, tokens already in the cache.
        head: ``bf16`` or ``int8``, of the ternary models.
    """

    stage: str
    batch: int
    length: int
    head: str = FULL

    @property
    def tokens(self) -> int:
        """Tokens that one pass computes."""
        return self.batch * (self.length if self.stage == "prefill" else 1)

    def __str__(self) -> str:
        what = f"{self.batch} × {self.length}" if self.stage == "prefill" else f"batch {self.batch}"
        return f"{self.stage} {what}" + (", int8 head" if self.head != FULL else "")


@dataclass
class Row:
    """Times of a case.

    Attributes:
        microseconds: kind → all repeats.
        backends: kind → layer → name of its backend.
        problem: kind → why it was not measured.
    """

    preset: str
    case: Case
    microseconds: dict[str, list[float]] = field(default_factory=dict)
    backends: dict[str, dict[str, str]] = field(default_factory=dict)
    problem: dict[str, str] = field(default_factory=dict)

    def rate(self, kind: str) -> float:
        """Tokens a second; KeyError for a kind without a measurement."""
        return self.case.tokens * 1e6 / statistics.median(self.microseconds[kind])

    def ratio(self, kind: str, over: str) -> float | None:
        """Rate over that of another kind; None if one of them was not measured."""
        if kind not in self.microseconds or over not in self.microseconds:
            return None
        return self.rate(kind) / self.rate(over)

    def text(self, kind: str) -> str:
        """Tokens a second and the ratio to BF16, for people; ``-`` without a measurement."""
        if kind not in self.microseconds:
            return "-"
        over = self.ratio(kind, FULL)
        beside = f" ({over:.2f}×)" if over is not None and kind != FULL else ""
        return f"{self.rate(kind):,.0f}{beside}"

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
                k: {"median": statistics.median(times), "all": [round(t, 1) for t in times]}
                for k, times in self.microseconds.items()
            },
            "backends": self.backends,
            "problem": self.problem,
        }

    def __str__(self) -> str:
        parts = [f"{kind} {self.text(kind)}" for kind in self.microseconds]
        parts += [f"{kind}: {why}" for kind, why in self.problem.items()]
        return f"{self.preset} {self.case!s:28} tokens/s: " + "  ".join(parts)


def bench(
    preset: str | None = None,
    *,
    prefill: tuple[str, ...] | None = None,
    decode: tuple[int, ...] | None = None,
    context: int = 512,
    kinds: tuple[str, ...] = KINDS,
    head: str = FULL,
    repeats: int = 7,
    out: Path | None = None,
) -> str:
    """Time prefill and decode of a model shape with random weights, ternary beside BF16.

    Args:
        preset: a model shape; qwen2.5-7b on a GPU, two layers of qwen2.5-0.5b without one.
        prefill: SEQUENCESxTOKENS; 1x512 and 4x4096 on a GPU, 1x128 without one.
        decode: batch sizes; 1, 8 and 32 on a GPU, 1 without one.
        context: tokens in the cache while decoding.
        kinds: bf16, fp8 (on a GPU) and patterns.
        head: bf16 or int8, of the ternary models.
        repeats: of every kind, in turns.
        out: write all repeats to this JSON file too, with versions, commit, driver and clocks.

    Raises:
        ConfigError: for an argument out of range.
    """
    on_gpu = torch.cuda.is_available()
    if head not in (FULL, "int8"):
        raise ConfigError(f"bench: head is {head!r}; choose bf16 or int8")
    if repeats < 1 or context < 1:
        raise ConfigError("bench: repeats and context have to be at least 1")
    if any(batch < 1 for batch in decode or ()):
        raise ConfigError(f"bench: decode {min(decode or ())} is no batch; it has to be 1 or more")
    if FP8 in kinds and not on_gpu:
        raise ConfigError("bench: fp8 needs an NVIDIA GPU")
    if prefill is None:
        prefill = ("1x512", "4x4096") if on_gpu else ("1x128",)
    if decode is None:
        decode = (1, 8, 32) if on_gpu else (1,)
    cases = [_parse_prefill(text, head) for text in prefill]
    cases += [Case("decode", batch, context, head) for batch in decode]
    if not on_gpu:
        console.say(
            f"no NVIDIA GPU here: {SMALL_LAYERS} layers of the model in float32 on the CPU "
            f"({native.explanation()}); bf16 in the table stands for full precision"
        )
    rows: list[Row] = []
    for row in measure(
        preset or ("qwen2.5-7b" if on_gpu else "qwen2.5-0.5b"),
        cases,
        kinds=kinds,
        repeats=repeats,
        layers=None if on_gpu else SMALL_LAYERS,
        vocabulary=None if on_gpu else SMALL_VOCABULARY,
        compiled=on_gpu,
    ):
        rows.append(row)
        console.say(str(row))
        if out is not None:
            values = {"environment": measured_on(), "rows": [row.to_dict() for row in rows]}
            files.write_text(out, json.dumps(values, indent=1) + "\n")
    device = torch.cuda.get_device_name(0) if on_gpu else f"CPU: {cpu_name()}"
    measured = list(dict.fromkeys(kind for row in rows for kind in row.microseconds))
    lines = [device + (f", {rows[0].preset}" if rows else "")]
    lines.append(f"{'tokens/s':28}" + "".join(f"{kind:>20}" for kind in measured))
    for row in rows:
        lines.append(f"{row.case!s:28}" + "".join(f"{row.text(kind):>20}" for kind in measured))
    return "\n".join(lines)


def _parse_prefill(text: str, head: str) -> Case:
    batch, _, length = text.partition("x")
    if not (batch.isdigit() and length.isdigit() and int(batch) and int(length) > 1):
        raise ConfigError(
            f"bench: prefill {text!r} is not understood: write SEQUENCESxTOKENS as in 4x4096"
        )
    return Case("prefill", int(batch), int(length), head)


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
    """Time the cases of one model shape; a row for each as soon as it is measured.

    Args:
        kinds: ``bf16``, ``fp8`` (on a GPU), and patterns of ternary models.
        repeats: of every kind, in turns.
        layers, vocabulary: for a smaller model than the preset's.
        compiled: compile the layers; without, everything around the products runs eagerly.

    Raises:
        ConfigError, PatternError: as :func:`random_decoder`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch._dynamo.config.recompile_limit = 256  # one graph a shape
    with torch.no_grad(), console.progress(f"{preset}, {device}", len(cases)) as task:
        for head in dict.fromkeys(case.head for case in cases):
            decoders = {}
            for kind in kinds:
                decoders[kind] = random_decoder(
                    preset,
                    kind,
                    head=head,
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
    calls: dict[str, Calls] = {}
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


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def call_of(decoder: DecoderForCausalLM, case: Case) -> Callable[[], Tensor]:
    """One pass of the case, which can be repeated: logits of the last tokens."""
    width = case.length if case.stage == "prefill" else 1
    vocabulary = decoder.config.vocab_size
    tokens = torch.randint(0, vocabulary, (case.batch, width), device=decoder.device)
    if case.stage == "prefill":
        return partial(_prefill, decoder, tokens)
    if decoder.device.type == "cuda":
        return partial(_static_step, decoder, tokens, _static_cache(decoder, case), case.length)
    return partial(_step, decoder, tokens, _cache(decoder, case))


def _prefill(decoder: DecoderForCausalLM, tokens: Tensor) -> Tensor:
    # Prompts of one length: no mask, and no search for padding.
    mask = {FULL_ATTENTION: None}
    logits: Tensor = decoder(tokens, attention_mask=mask, use_cache=False, logits_to_keep=1).logits
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
        decoder.config, case.batch, case.length + FREE_SLOTS, decoder.dtype, decoder.device
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
        name: module.prepared("weight").backend
        for name, module in decoder.model.layers[0].named_modules()
        if isinstance(module, PackedLinear)
    }
