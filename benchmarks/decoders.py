"""Random decoders to be timed, and timing in turns."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig

from sparse_bitnet.core import Pattern
from sparse_bitnet.kernels.platform import compile_options
from sparse_bitnet.modeling import DecoderForCausalLM, build_decoder
from sparse_bitnet.modeling.decoder import Decoder
from sparse_bitnet.nn.int8_head import Int8Head, quantize_rows
from sparse_bitnet.nn.pack import pack_module
from sparse_bitnet.nn.packed_module import prepare
from sparse_bitnet.nn.sparse_bit_linear import SparseBitLinear
from sparse_bitnet.train.presets import preset_config

FULL, FP8 = "bf16", "fp8"
FP8_LARGEST = torch.finfo(torch.float8_e4m3fn).max
MOST_REPLAYS, TURN_MICROSECONDS = 16, 20_000.0
# From so many microseconds on a graph takes longer than its launch by the host, so that launches of
# several hide behind their work; shorter ones hold many calls instead.
WHOLE_PASS = 500.0

Calls = Sequence[Callable[[], object]]


class Fp8Linear(nn.Module):
    """What servers run in fp8: e4m3, a scale for each row of the weight and for each token."""

    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.float().abs().amax(-1, keepdim=True) / FP8_LARGEST
        self.register_buffer("weight", (weight / scale).to(torch.float8_e4m3fn))
        self.register_buffer("scale", scale.t().contiguous())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` in bfloat16 → ``[..., out]``."""
        rows = x.flatten(0, -2)
        scale = rows.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / FP8_LARGEST
        y = torch._scaled_mm(
            (rows.float() / scale).to(torch.float8_e4m3fn),
            self.get_buffer("weight").t(),
            scale_a=scale,
            scale_b=self.get_buffer("scale"),
            bias=self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return y.view(*x.shape[:-1], -1)


def random_decoder(
    preset: str,
    kind: str,
    *,
    head: str = FULL,
    layers: int | None = None,
    vocabulary: int | None = None,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> DecoderForCausalLM:
    """A decoder of a preset's shape with random weights.

    One layer is drawn, packed and prepared; the others are copies of it in their own memory, so a
    7B model is built in seconds and reads as many bytes as a trained one.

    Args:
        preset: a key of :data:`sparse_bitnet.train.presets.PRESETS`.
        kind: ``bf16``, ``fp8`` (on a GPU) or the pattern of ternary linears.
        head: ``bf16`` or ``int8``; in full precision for the first two kinds.
        layers: how many; those of the preset if left out.
        vocabulary: of small shapes, which publish none.

    Raises:
        ConfigError: for an unknown preset.
        PatternError: if M does not divide a layer's input features.
    """
    is_ternary = kind not in (FULL, FP8)
    config = preset_config(preset, vocabulary)
    count = layers or config.num_hidden_layers
    config.num_hidden_layers, config.layer_types = 1, ["full_attention"]
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.requires_grad_(False)
    if is_ternary:
        pattern = Pattern.parse(kind)
        for name, linear in list(model.model.layers.named_modules()):
            if type(linear) is nn.Linear:
                trained = SparseBitLinear(linear, pattern)
                model.model.layers.set_submodule(name, pack_module(trained, "two-bit", name))
    if is_ternary and head == "int8":
        rows, width = model.lm_head.weight.shape
        int8 = Int8Head(rows, width, device=device, dtype=dtype)
        int8.weight, int8.weight_scale = quantize_rows(model.lm_head.weight)
        model.lm_head = int8
    one = build_decoder(model)
    prepare(one)
    body = one.model
    if kind == FP8:
        for name, linear in list(body.layers.named_modules()):
            if type(linear) is nn.Linear:
                body.layers.set_submodule(name, Fp8Linear(linear))
    config.num_hidden_layers, config.layer_types = count, ["full_attention"] * count
    first: Any = body.layers[0]
    stack = [first, *(copy.deepcopy(first, {id(config): config}) for _ in range(count - 1))]
    for index, layer in enumerate(stack):
        layer.self_attn.layer_idx = index
    whole = Decoder(config, body.embed_tokens, stack, body.norm, body.rotary_emb)
    return DecoderForCausalLM(whole, one.lm_head, GenerationConfig.from_model_config(config))


def compile_parts(model: DecoderForCausalLM) -> None:
    """Compile a layer, once for all of them, and what stands around the layers."""
    for part in (*model.model.layers, model.model.rotary_emb, model.model.norm):
        part.compile(dynamic=False, options=compile_options())


def capture(calls: Calls, rounds: int = 1) -> torch.cuda.CUDAGraph:
    """Warm up, then put every call ``rounds`` times into one CUDA graph."""
    for _ in range(2):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    return graph


def interleaved(
    candidates: Mapping[str, Calls], repeats: int = 9, fewest: int = 1
) -> dict[str, list[float]]:
    """Microseconds of one call of every candidate, all repeats, candidates taking turns.

    So clocks, temperature and neighbours hit all alike. On CUDA each candidate is a graph of its
    calls (the same work on different memory, where caches would hold it); without a GPU the calls
    themselves take turns. Passes of few milliseconds are replayed several times a turn, as tokens
    are generated one after another: otherwise the host's launch of the first would be in the time.

    Args:
        candidates: name → the same work, on different memory.
        repeats: of every candidate.
        fewest: calls in a graph, so that its own start, some microseconds, does not count.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    if not torch.cuda.is_available():
        for calls in candidates.values():
            _microseconds(calls)
        for _ in range(repeats):
            for name, calls in candidates.items():
                times[name].append(_microseconds(calls) / len(calls))
        return times
    rounds = {name: -(-fewest // len(calls)) for name, calls in candidates.items()}
    graphs = {name: capture(calls, rounds[name]) for name, calls in candidates.items()}
    shortest = min(replay_microseconds(graph, 1) for graph in graphs.values())
    replays = 1
    if shortest >= WHOLE_PASS:
        replays = min(MOST_REPLAYS, max(1, round(TURN_MICROSECONDS / shortest)))
    for _ in range(repeats):
        for name, graph in graphs.items():
            count = replays * rounds[name] * len(candidates[name])
            times[name].append(replay_microseconds(graph, replays) / count)
    return times


def replay_microseconds(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Of all replays together, one after another."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def _microseconds(calls: Calls) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start) * 1e6
