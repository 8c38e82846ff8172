"""Prefill and decode of model shapes with random weights: python benchmarks/inference.py

BF16, fp8, dense BitNet, 6:8 and 2:4, by default of the Qwen2.5 3B and 7B shapes. All models run in
the package's own decoder, in one process, in turns. On a GPU its layers are compiled one by one,
its cache is static, and a pass is one CUDA graph; on a CPU a token takes the native call.
Everything is in the time: embedding, norms, quantization of activations, products, scales,
attention, the output head for the last token.

The file is written after every row. ``--profile`` prints the kernels of one step of each kind
instead of timing it. ``--power`` runs each kind alone for two seconds and notes the clock and power
that it settles at: products that keep more of the chip busy run at lower clocks.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decoders import FULL, Calls, capture, compile_parts, interleaved, random_decoder
from gpu_common import write
from machine import gpu_state
from sparse_bitnet import console
from sparse_bitnet.modeling import DecoderForCausalLM, KeyValueCache, StaticKeyValueCache
from sparse_bitnet.modeling.decoder import FULL as FULL_ATTENTION
from sparse_bitnet.nn.packed_linear import PackedLinear

KINDS = (FULL, "dense", "6:8", "2:4")
FREE_SLOTS = 64  # of a decode's cache
PREFILL = ((1, 512), (1, 2048), (4, 4096), (1, 16384), (16, 4096))
DECODE = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXT = 512


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
        parts = []
        for kind in self.microseconds:
            over = self.ratio(kind, FULL)
            parts.append(f"{kind} {self.rate(kind):,.0f}" + (f" ({over:.2f}×)" if over else ""))
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


def profile(preset: str, case: Case, kinds: list[str]) -> None:
    """Print the device time of every kernel of one pass."""
    for kind in kinds:
        decoder = random_decoder(preset, kind, head=case.head)
        compile_parts(decoder)
        call = call_of(decoder, case)
        for _ in range(3):
            call()
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as found:
            call()
            torch.cuda.synchronize()
        print(f"== {preset} {kind} {case}")
        print(found.key_averages().table(sort_by="cuda_time_total", row_limit=24)[:9000])
        del decoder, call
        torch.cuda.empty_cache()


def power(preset: str, case: Case, kinds: list[str], out: Path | None) -> None:
    """Milliseconds, SM clock and power of each kind running alone, after a second of it."""
    rows: list[dict[str, Any]] = []
    for kind in kinds:
        decoder = random_decoder(preset, kind)
        compile_parts(decoder)
        graph = capture([call_of(decoder, case)])
        times: list[float] = []
        states: list[dict[str, Any]] = []
        started = time.monotonic()
        while time.monotonic() - started < 2.0:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(2):
                graph.replay()
            end.record()
            if time.monotonic() - started > 1.0:
                states.append(gpu_state())
            end.synchronize()
            times.append(start.elapsed_time(end) / 2)
        row = {
            "model": preset,
            "case": str(case),
            "kind": kind,
            "milliseconds": statistics.median(times[len(times) // 2 :]),
            **{name: statistics.median(s[name] for s in states) for name in ("sm_mhz", "watts")},
        }
        print(row, flush=True)
        every = {name: [state[name] for state in states] for name in ("sm_mhz", "watts")}
        rows.append(row | {"all": {"milliseconds": [round(t, 3) for t in times], **every}})
        write("inference_power", rows, out)
        del graph, decoder
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["qwen2.5-7b", "qwen2.5-3b"])
    parser.add_argument("--kinds", nargs="+", default=["bf16", "fp8", *KINDS[1:]])
    parser.add_argument("--prefill", nargs="*", default=[f"{b}x{n}" for b, n in PREFILL])
    parser.add_argument("--decode", nargs="*", type=int, default=list(DECODE))
    parser.add_argument("--int8-head", nargs="*", type=int, default=[1], help="decode batches too")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--power", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    options = parser.parse_args()
    cases = []
    for text in options.prefill:
        batch, length = text.split("x")
        cases.append(Case("prefill", int(batch), int(length)))
    cases += [Case("decode", batch, CONTEXT) for batch in options.decode]
    cases += [Case("decode", batch, CONTEXT, "int8") for batch in options.int8_head]
    if options.power:
        with torch.no_grad():
            power(options.models[0], cases[0], options.kinds, options.out)
        return
    if options.profile:
        with torch.no_grad():
            for case in cases:
                profile(options.models[0], case, options.kinds)
        return
    rows = []
    started = time.monotonic()
    for preset in options.models:
        for row in measure(preset, cases, kinds=tuple(options.kinds), repeats=options.repeats):
            print(f"{time.monotonic() - started:5.0f} s  {row}", flush=True)
            rows.append(row.to_dict())
            write("inference", rows, options.out)
            if time.monotonic() - started > 60 * options.minutes:
                return


if __name__ == "__main__":
    main()
