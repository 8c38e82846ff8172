"""``estimate``: memory, best possible speed and cost of a model, from its configuration alone.

The model is built on the meta device and converted there, so shapes are real and nothing is
allocated. File sizes come from the code that packs. Times are rooflines: each product takes as
long as its arithmetic or its memory traffic at the device's peak, whichever is longer, so they
bound from below what any kernel can do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from sparse_bitnet.core import ConfigError, Pattern
from sparse_bitnet.estimate.devices import Device, device_named
from sparse_bitnet.formats import StorageName
from sparse_bitnet.kernels import native
from sparse_bitnet.nn import convert, converted_modules
from sparse_bitnet.packed.load import DType
from sparse_bitnet.packed.sizes import least_bits, readable_bytes
from sparse_bitnet.packed.write import HeadName, packed_sizes
from sparse_bitnet.train.model import empty_model

# What autograd keeps of a decoder layer in an eager step under bf16 autocast, bytes a token:
# a·hidden + b·intermediate + c·key-value width + d, counted with saved-tensor hooks.
KEPT = {"bf16": (30.25, 8.0, 4.0, 8.0), "bitnet": (26.25, 7.0, 4.0, 36.0)}

STATE = 4 + 4 + 8  # bytes a trained parameter: float32 master and gradient, Adam's two moments
TRAINED = 0.4  # of the bf16 peak that a training step reaches
HOST = 8  # GPUs that share fast links
NETWORK = 50.0  # GB/s of a GPU beyond its host: 400 Gbit/s


# What every figure of an estimate rests on.
ASSUMED = """\
· times are rooflines, products one after the other, each bound by arithmetic or by reading its
  weight; norms, activations and launches are free
· the BF16 baseline runs the same products in bf16; attention and KV cache are bf16 in both
· training: float32 masters, gradients and two Adam moments, 16 bytes a parameter; activations as
  autograd keeps them without checkpointing, logits in chunks"""
ON_A_GPU = """
· whole 7B models measured on an H200: prefill 1.92×, decode 2.9× for one sequence and 2.5× for
  sixteen
· a weight is kept once, at two bits, whatever its pattern"""
WITH_EXPERTS = "\n· tokens meet different experts until all are met; routing is free"


class DecoderShape:
    """Dimensions of a decoder beside its linears."""

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        self.layers, self.hidden = config.num_hidden_layers, config.hidden_size
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or self.hidden // heads
        self.query_width = heads * width
        self.kv_width = (getattr(config, "num_key_value_heads", None) or heads) * width
        used = getattr(config, "num_experts_per_tok", None)
        experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
        self.active_experts = used / experts if used and experts else 1.0
        intermediate = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        self.intermediate = intermediate * (used or 1)
        head: Any = model.get_output_embeddings()
        self.head, self.head_bytes = head.weight.numel(), head.weight.nbytes
        self.tied = head.weight is model.get_input_embeddings().weight
        window = getattr(config, "sliding_window", None)
        # Tokens that each layer keeps at most: all (None), a window, or none (linear attention,
        # Mamba, convolutions).
        limits = {"sliding_attention": window, "linear_attention": 0}
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * self.layers
        self.windows = [limits.get(k, None if k.endswith("attention") else 0) for k in kinds]

    def kv_lengths(self, context: int) -> list[int]:
        """Tokens in each layer's key-value cache for a sequence of that length."""
        return [context if window is None else min(context, window) for window in self.windows]

    def kv_bytes(self, context: int) -> int:
        """Bytes of one sequence's key-value cache in bfloat16."""
        return 2 * 2 * self.kv_width * sum(self.kv_lengths(context))


def _bytes_a_weight(device: Device, pattern: Pattern) -> float:
    """Of a ternary weight as the device keeps it and a product reads it."""
    if not device.is_gpu and native.path() == native.REFERENCE:
        return 1.0
    fits_2_4 = not pattern.is_dense and pattern.n <= 2 and pattern.m % 4 == 0
    return 1.5 / 8 if not device.is_gpu and fits_2_4 and native.reads_six_bit() else 0.25


class Time(NamedTuple):
    """A roofline, in seconds; what takes longer, arithmetic or memory; and the bytes read."""

    seconds: float
    bound: str
    read: float


class Pair(NamedTuple):
    """A figure of the BF16 model and of the packed one."""

    bf16: Any
    packed: Any


def sharding(
    weights: int, layers: int, others: int, device: Device, gpus: int, tokens: int
) -> dict[str, float]:
    """What one of several GPUs that train together keeps, receives and waits for, in bytes and
    seconds of a step of ``tokens`` (all GPUs together) in one micro-batch.

    FSDP2 as ``nn.shard`` sets it up: the ternary ``weights`` of ``layers`` are gathered as two bits
    for forward and again for backward; the root's ``others`` (embeddings, head) in float32, once;
    gradients are reduced in float32. The network's time is as if nothing were hidden.
    """
    part, every = (gpus - 1) / gpus, weights + others
    gathered, reduced = part * (2 * weights / 4 + 4 * others), part * 4 * every
    link = device.link if gpus <= HOST else min(NETWORK, device.link)
    return {
        "shards": STATE * every / gpus,
        # Beside them at the peak: two layers as gathered, one of them as int8 and its float32
        # gradients twice; the root's parameters and their gradients.
        "whole": weights / layers * (2 / 4 + 1 + 2 * 4) + 2 * 4 * others,
        "gathered": gathered,
        "reduced": reduced,
        "compute_seconds": 6.0 * every * tokens / gpus / (TRAINED * device.bf16 * 1e12),
        "network_seconds": (gathered + reduced) / (link * 1e9),
    }


@dataclass(frozen=True)
class Estimate:
    """What :func:`estimate` found; ``str()`` is a page for people. Sizes in bytes."""

    weights: int  # that become ternary, in so many modules
    modules: int
    other_parameters: int  # embeddings, norms, head and biases; tied ones once
    stored_bits: float  # a weight in the files, scales included
    kv_bytes: int  # all sequences
    operations_per_token: float  # without attention
    files: Pair
    on_device: Pair  # weights, as products read them
    training: Pair  # masters, Adam's moments, gradients; ternary weights kept for backward
    activations: Pair  # that training keeps for backward, a token
    prefill: Pair  # Time of all sequences' prompts together
    decode: Pair  # Time of one token of every sequence; weights and KV cache are read
    sharding: dict[str, float] | None  # of training over several GPUs
    page: str = field(compare=False, repr=False)

    def __str__(self) -> str:
        return self.page


def estimate(
    model: str,
    *,
    pattern: str = "6:8",
    gpu: str = "h200",
    storage: StorageName = "two-bit",
    head: HeadName = "float",
    dtype: DType = "bfloat16",
    prompt: int = 2048,
    context: int = 4096,
    batch: int = 1,
    vocab_size: int | None = None,
    price: float | None = None,
    gpus: int = 1,
    step: int = 2**22,
) -> Estimate:
    """Memory, arithmetic and best possible times of a model before training.

    Args:
        model: a preset such as qwen2.5-1.5b, a Hugging Face directory, or a config.json.
        pattern: N:M of all linears, or dense.
        gpu: a100, h100, h200, b200, l4, l40s, rtx4090, or cpu for this machine's, measured.
        storage: of the packed files.
        head: float, or int8 with a scale for each row.
        dtype: of embeddings, norms, biases and a float head in the packed files.
        prompt: tokens of a prompt, for prefill.
        context: tokens in the KV cache while decoding.
        batch: sequences at once.
        vocab_size: rows of the embedding, where a preset leaves it to the data.
        price: of the device in any currency, an hour.
        gpus: that train together; eight share a host.
        step: tokens of a training step, all GPUs together.

    Raises:
        ConfigError: if the model cannot be found or built, or a number is out of range.
        PatternError: if the pattern is malformed or does not divide a weight.
    """
    counts = {"prompt": prompt, "context": context, "batch": batch, "gpus": gpus, "step": step}
    for name, value in counts.items():
        if value < 1:
            raise ConfigError(f"estimate: --{name} is {value}; it has to be 1 or more")
    if price is not None and not 0 <= price < math.inf:
        raise ConfigError(f"estimate: --price is {price}; it has to be 0 or more")
    parsed, device = Pattern.parse(pattern), device_named(gpu)
    skeleton = empty_model(model, vocab_size, getattr(torch, dtype))
    try:
        shape = DecoderShape(skeleton)
    except AttributeError as error:
        raise ConfigError(
            f"{model}: a {type(skeleton).__name__} is no decoder of attention and MLPs as "
            f"estimates know it ({error})"
        ) from None
    parameters = sum(p.numel() for p in skeleton.parameters())
    convert(skeleton, parsed)
    sizes = packed_sizes(skeleton, storage, head, dtype)
    stored, rows = _bytes_a_weight(device, parsed), 0
    linears: list[tuple[int, float]] = []  # weights of each module, the part that a token meets
    for _, module in converted_modules(skeleton):
        masters = list(module.master_parameters().values())
        rows += sum(weight.numel() // weight.shape[-1] for weight in masters)
        active = shape.active_experts if masters[0].dim() == 3 else 1.0
        linears.append((sum(weight.numel() for weight in masters), active))
    weights = sum(count for count, _ in linears)

    def roofline(tokens: int, length: int, packed: bool, decoding: bool) -> Time:
        """Of linears, head on each last token, attention."""
        kept = shape.kv_lengths(length)
        seen = sum(kept if decoding else (n * (n + 1) / 2 + (length - n) * n for n in kept))
        of_head, head_bytes = 2 * shape.head * batch, shape.head_bytes if packed else 2 * shape.head
        # (bf16 operations, int8 operations, bytes) of each product
        products: list[tuple[float, float, float]] = [
            (4 * shape.query_width * seen * batch, 0, batch * shape.kv_bytes(length))
        ]
        int8_head = packed and head == "int8"  # two int8 terms a token
        products.append((0, 2 * of_head, shape.head) if int8_head else (of_head, 0, head_bytes))
        for count, active in linears:
            operations = 2 * count * active * tokens
            # Of experts, every token may meet others, up to all of them.
            read = (stored if packed else 2) * count * min(1.0, active * tokens)
            products.append((0, operations, read) if packed else (operations, 0, read))
        bf16, int8, read = np.array(products, dtype=float).T
        arithmetic = bf16 / device.bf16 / 1e12 + int8 / device.int8 / 1e12
        memory = read / device.bandwidth / 1e9
        bound = "arithmetic" if arithmetic.sum() > memory.sum() else "memory"
        return Time(float(np.maximum(arithmetic, memory).sum()), bound, float(read.sum()))

    others = parameters - weights
    kv_bytes, stored_bits = batch * shape.kv_bytes(context), 8 * sizes.packed_bytes / weights
    operations = 2 * (sum(count * active for count, active in linears) + shape.head)
    files = Pair(2 * parameters, sizes.file_bytes)
    on_device = Pair(files.bf16, int(stored * weights + 4 * rows + sizes.other_bytes))
    state = STATE * parameters  # and the ternary weights, which backward reads
    training = Pair(state, state + weights // (4 if device.is_gpu else 1))
    widths = (shape.hidden, shape.intermediate, shape.kv_width, 1)
    activations = Pair(*(shape.layers * float(np.dot(kept, widths)) for kept in KEPT.values()))
    prefill = Pair(*(roofline(batch * prompt, prompt, p, False) for p in (False, True)))
    decode = Pair(*(roofline(batch, context, p, True) for p in (False, True)))
    split = sharding(weights, shape.layers, others, device, gpus, step) if gpus > 1 else None

    def row(name: str, texts: Iterable[str], more: str = "") -> str:
        return f"{name:32}" + "".join(f"{text:>12}" for text in texts) + more

    def sized(name: str, counts: Iterable[float]) -> str:
        return row(name, map(readable_bytes, counts))

    def timed(name: str, times: Pair) -> str:
        faster = times.bf16.seconds / times.packed.seconds
        more = f"  {faster:.2f}×, bound by {times.packed.bound}"
        return row(name, (f"{1e3 * one.seconds:,.2f} ms" for one in times), more)

    lines = [
        f"{model}, {parsed}, {storage}, head {head}"
        f"{', shared with the embedding' if shape.tied else ''}; on {device.name}",
        "",
        f"becomes ternary   {weights:,} weights in {len(linears)} modules",
        f"stays             {others:,} parameters",
        f"bits a weight     {stored_bits:.2f} in the files; the least for {parsed} is "
        f"{least_bits(parsed):.3f}",
        "",
        row("", ("BF16", str(parsed))),
        sized("weight files", files),
        sized("weights on the device", on_device),
        sized(f"KV cache, {batch} × {context:,}", 2 * [kv_bytes]),
        sized("training state", training),
        sized("activations a trained token", activations),
        row("operations a token", 2 * [f"{operations / 1e9:,.2f} G"]),
        sized("read for a decoded token", (one.read / batch for one in decode)),
        timed(f"prefill, {batch} × {prompt:,} tokens", prefill),
        timed(f"decode, {batch} × 1 token", decode),
    ]
    memory = device.memory * 1e9
    for name, taken in zip(("BF16", str(parsed)), on_device, strict=True):
        if memory and taken + kv_bytes > memory:
            lines.append(f"{name} does not fit: the device has {readable_bytes(memory)}")
    if split is not None:
        shard, whole, gathered, reduced, *_ = map(readable_bytes, split.values())
        lines += [
            "",
            f"training on {gpus} GPUs, {step:,} tokens a step, sharded (FSDP2, two bits gathered):",
            f"  a GPU keeps {shard} of shards and at most {whole} whole, and activations",
            f"  a GPU gathers {gathered} and reduces {reduced} a micro-batch",
            f"  a step computes {split['compute_seconds']:.3g} s and communicates at most "
            f"{split['network_seconds']:.3g} s",
        ]
    if price is not None:
        lines += ["", f"at {price:g} an hour, a million tokens cost at least"]
        for what, times, tokens in (("prefill", prefill, prompt), ("decode", decode, 1)):
            spent = [price / 3600 * one.seconds / (batch * tokens) * 1e6 for one in times]
            saved = f"  {1 - spent[1] / spent[0]:.0%} saved" if spent[0] else ""
            lines.append(row(f"  {what}", (f"{one:.4f}" for one in spent), saved))
    tera = [f"{rate:,.1f}" if rate >= 1 else f"{rate:.2g}" for rate in (device.bf16, device.int8)]
    lines += [
        "",
        f"· {device.name}: {tera[0]} TFLOPS bf16, {tera[1]} TOPS int8, "
        f"{device.bandwidth:,.0f} GB/s ({device.source})",
        ASSUMED + ON_A_GPU * device.is_gpu + WITH_EXPERTS * (shape.active_experts < 1),
    ]
    facts = (weights, len(linears), others, stored_bits, kv_bytes, operations, files, on_device)
    return Estimate(*facts, training, activations, prefill, decode, split, "\n".join(lines))
