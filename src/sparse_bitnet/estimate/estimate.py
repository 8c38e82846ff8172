"""``estimate``: memory, best possible speed and cost of a model, from its configuration alone.

The model is built on the meta device and converted there, so shapes are real and nothing is
allocated. File sizes come from the code that packs. Times are rooflines: each product takes as
long as its arithmetic or its memory traffic at the device's peak, whichever is longer, so they
bound from below what any kernel can do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparse_bitnet.core import ConfigError, Pattern
from sparse_bitnet.estimate.devices import Device, device_named
from sparse_bitnet.estimate.sharding import Sharding, sharding, tokens_that_hide
from sparse_bitnet.formats import StorageName
from sparse_bitnet.kernels import native
from sparse_bitnet.nn import DerivedModule, convert, converted_modules
from sparse_bitnet.packed.load import DType
from sparse_bitnet.packed.sizes import least_bits, readable_bytes
from sparse_bitnet.packed.write import HeadName, packed_sizes
from sparse_bitnet.train.dense import read_shape
from sparse_bitnet.train.presets import PRESETS, preset_config

SIX_BIT = 1.5 / 8  # bytes a weight of 2:4 on a CPU
# What autograd keeps of a decoder layer in an eager step under bf16 autocast, bytes a token:
# a·hidden + b·intermediate + c·key-value width + d, counted with saved-tensor hooks.
KEPT = {"bitnet": (26.25, 7.0, 4.0, 36.0), "bf16": (30.25, 8.0, 4.0, 8.0)}


class DecoderShape:
    """Dimensions of a decoder beside its linears."""

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        self.layers = config.num_hidden_layers
        self.hidden = config.hidden_size
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
        # Tokens that each layer keeps at most: all (None), a window, or none (linear attention).
        self.windows = [
            window if kind == "sliding_attention" else None if _has_kv_cache(kind) else 0
            for kind in getattr(config, "layer_types", None) or ["sliding_attention"] * self.layers
        ]

    def kv_lengths(self, context: int) -> list[int]:
        """Tokens in each layer's key-value cache for a sequence of that length."""
        return [context if window is None else min(context, window) for window in self.windows]

    def kv_bytes(self, context: int) -> int:
        """Bytes of one sequence's key-value cache in bfloat16."""
        return sum(2 * 2 * self.kv_width * length for length in self.kv_lengths(context))

    def kept_bytes(self, kind: str) -> float:
        """What autograd keeps for backward, bytes a token."""
        a, b, c, d = KEPT[kind]
        return self.layers * (a * self.hidden + b * self.intermediate + c * self.kv_width + d)


def _has_kv_cache(kind: str) -> bool:
    """False for layers of linear attention, Mamba, convolutions."""
    return kind.endswith("attention") and kind != "linear_attention"


class Linear:
    """One converted module: its weights, and what a product reads and computes of each."""

    def __init__(self, shape: DecoderShape, module: DerivedModule) -> None:
        masters = list(module.master_parameters().values())
        pattern = module.pattern
        self.weights = sum(weight.numel() for weight in masters)
        self.rows = sum(weight.numel() // weight.shape[-1] for weight in masters)
        self.experts = masters[0].dim() == 3
        self.active = shape.active_experts if self.experts else 1.0  # the part that a token meets
        self.pairs = not pattern.is_dense and pattern.n <= 2 and pattern.m % 4 == 0  # fits 2:4

    def bytes_a_weight(self, device: Device) -> float:
        """Of the one layout that the device keeps and its product reads."""
        if device.is_gpu:
            return 0.25
        if native.path() == native.REFERENCE:
            return 1.0
        return SIX_BIT if self.pairs and native.reads_six_bit() else 0.25


@dataclass(frozen=True)
class Cost:
    """One way to run: the model in BF16, or packed. Sizes in bytes, times in seconds."""

    file_bytes: int
    device_bytes: int  # weights on the device, with the layouts that products read
    prefill_seconds: float  # all sequences' prompts together
    decode_seconds: float  # one token of every sequence
    prefill_bound: str  # what takes longer: arithmetic or memory
    decode_bound: str
    operations_per_token: float  # without attention
    bytes_per_token: float  # read to decode one token: weights and KV cache
    training_bytes: int  # masters, Adam's moments, gradients; ternary weights kept for backward
    activation_bytes: float  # that training keeps for backward, a token


@dataclass(frozen=True)
class Estimate:
    """What :func:`estimate` found, with its arguments; ``str()`` is a page for people."""

    model: str
    pattern: str
    storage: str
    head: str
    device: Device
    prompt: int
    context: int
    batch: int
    price: float | None
    weights: int  # that become ternary, in so many modules
    modules: int
    other_parameters: int  # embeddings, norms, head and biases; tied ones once
    stored_bits: float  # a weight in the files, scales included
    least_bits: float  # that any lossless code of the pattern needs
    kv_bytes: int  # all sequences
    bf16: Cost
    packed: Cost
    sharding: Sharding | None  # of training over several GPUs
    assumptions: list[str]

    def __str__(self) -> str:
        return _page(self)


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
        model: a preset such as qwen2.5-1.5b, or a directory with a Hugging Face config.json.
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
            raise ConfigError(f"estimate: {name} is {value}; it has to be 1 or more")
    if price is not None and not 0 <= price < math.inf:
        raise ConfigError(f"estimate: price is {price}; it has to be 0 or more")
    parsed, device = Pattern.parse(pattern), device_named(gpu)
    skeleton = empty_model(model, vocab_size, getattr(torch, dtype))
    try:
        shape = DecoderShape(skeleton)
    except AttributeError as error:
        raise ConfigError(
            f"{model}: a {type(skeleton).__name__} is no decoder of attention and MLPs as "
            f"estimates know it ({error})"
        ) from None
    dense_parameters = sum(p.numel() for p in skeleton.parameters())
    convert(skeleton, parsed)
    sizes = packed_sizes(skeleton, storage, head, dtype)
    modules = [module for _, module in converted_modules(skeleton)]
    linears = [Linear(shape, module) for module in modules]
    weights = sum(linear.weights for linear in linears)

    def cost(packed: bool) -> Cost:
        prefill, prefill_bound, _ = roofline(batch * prompt, prompt, packed)
        decode, decode_bound, read = roofline(batch, context, packed, decoding=True)
        for_backward = 0.25 if device.is_gpu else 1.0  # bytes a ternary weight
        ternary = sum(x.weights * x.bytes_a_weight(device) + 4 * x.rows for x in linears)
        files = sizes.file_bytes if packed else 2 * dense_parameters
        return Cost(
            file_bytes=files,
            device_bytes=int(ternary + sizes.other_bytes) if packed else files,
            prefill_seconds=prefill,
            decode_seconds=decode,
            prefill_bound=prefill_bound,
            decode_bound=decode_bound,
            operations_per_token=2 * (sum(x.weights * x.active for x in linears) + shape.head),
            bytes_per_token=read / batch,
            training_bytes=dense_parameters * (4 + 4 + 8)
            + (int(weights * for_backward) if packed else 0),
            activation_bytes=shape.kept_bytes("bitnet" if packed else "bf16"),
        )

    def roofline(
        tokens: int, length: int, packed: bool, decoding: bool = False
    ) -> tuple[float, str, float]:
        """(seconds, what bounds them, bytes read): linears, head on each last token, attention."""
        kept = shape.kv_lengths(length)
        seen = sum(kept if decoding else (n * (n + 1) / 2 + (length - n) * n for n in kept))
        # (bf16 operations, int8 operations, bytes) of each product
        attention = 4 * shape.query_width * seen * batch
        products: list[tuple[float, float, float]] = [
            (attention, 0.0, batch * shape.kv_bytes(length))
        ]
        operations = 2 * shape.head * batch
        if packed and head == "int8":  # two int8 terms a token
            products.append((0.0, 2 * operations, shape.head))
        else:
            products.append((operations, 0.0, shape.head_bytes if packed else 2 * shape.head))
        for linear in linears:
            operations = 2 * linear.weights * linear.active * tokens
            # Of experts, every token may meet others, up to all of them.
            read = linear.weights * min(1.0, linear.active * tokens)
            if packed:
                products.append((0.0, operations, linear.bytes_a_weight(device) * read))
            else:
                products.append((operations, 0.0, 2 * read))
        limits = [_limits(device, product) for product in products]
        arithmetic, memory = map(sum, zip(*limits, strict=True))
        bound = "arithmetic" if arithmetic > memory else "memory"
        return sum(map(max, limits)), bound, sum(read for _, _, read in products)

    return Estimate(
        model,
        str(parsed),
        storage,
        f"{head}{', shared with the embedding' if shape.tied else ''}",
        device,
        prompt,
        context,
        batch,
        price,
        weights=weights,
        modules=len(linears),
        other_parameters=dense_parameters - weights,
        stored_bits=8 * sizes.packed_bytes / weights,
        least_bits=least_bits(parsed),
        kv_bytes=batch * shape.kv_bytes(context),
        bf16=cost(packed=False),
        packed=cost(packed=True),
        sharding=None
        if gpus == 1
        else sharding(weights, shape.layers, dense_parameters - weights, device, gpus, step),
        assumptions=_assumptions(device, parsed, shape.active_experts < 1),
    )


def _limits(device: Device, product: tuple[float, float, float]) -> tuple[float, float]:
    """Seconds of a product's arithmetic and of its memory traffic."""
    bf16, int8, read = product
    arithmetic = bf16 / (device.bf16 * 1e12) + int8 / (device.int8 * 1e12)
    return arithmetic, read / (device.bandwidth * 1e9)


def empty_model(source: str, vocab_size: int | None, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a preset, directory or ``config.json`` on the meta device: shapes, no weights.

    Raises:
        ConfigError: if there is none, or transformers cannot build a model of it.
    """
    path = Path(source)
    try:
        if source in PRESETS:
            config: Any = preset_config(source, vocab_size)
        elif path.exists():
            config = read_shape(path)
        else:
            raise ConfigError(
                f"{source}: no preset and no such directory or config.json; the presets are "
                f"{', '.join(PRESETS)}"
            )
        config.quantization_config = None  # of a packed directory
        del config.quantization_config
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    except ConfigError:
        raise
    except Exception as error:  # whatever a foreign config.json makes transformers raise
        raise ConfigError(
            f"{source}: transformers cannot build a model of this config.json: {str(error)[:300]}"
        ) from error


def _assumptions(device: Device, pattern: Pattern, has_experts: bool) -> list[str]:
    """What every figure of an estimate rests on."""
    lines = [
        f"{device.name}: {_rate(device.bf16)} TFLOPS bf16, {_rate(device.int8)} TOPS int8, "
        f"{device.bandwidth:,.0f} GB/s ({device.source})",
        "times are rooflines, products one after the other, each bound by arithmetic or by reading "
        "its weight; norms, activations and launches are free",
    ]
    if device.is_gpu:
        lines += [
            "whole 7B models measured on an H200: prefill 1.90×, decode 2.9× for one sequence and "
            "2.5× for sixteen",
            "a weight is kept once, at two bits, whatever its pattern",
        ]
    lines += [
        "the BF16 baseline runs the same products in bf16; attention and KV cache are bf16 in both",
        "training: float32 masters, gradients and two Adam moments, 16 bytes a parameter; "
        "activations as autograd keeps them without checkpointing, logits in chunks",
    ]
    if has_experts:
        lines.append("tokens meet different experts until all are met; routing is free")
    return lines


def _rate(tera: float) -> str:
    """``1,978.9``; below 1, as of a slow CPU, two significant digits."""
    return f"{tera:,.1f}" if tera >= 1 else f"{tera:.2g}"


def _page(found: Estimate) -> str:
    def row(name: str, texts: Iterable[str], more: str = "") -> str:
        return f"{name:32}" + "".join(f"{text:>12}" for text in texts) + more

    def each(what: str) -> list[float]:
        return [getattr(cost, what) for cost in (found.bf16, found.packed)]

    def sizes(name: str, counts: Iterable[float]) -> str:
        return row(name, map(readable_bytes, counts))

    def times(name: str, what: str) -> str:
        was, now = each(f"{what}_seconds")
        more = f"  {was / now:.2f}×, bound by {getattr(found.packed, f'{what}_bound')}"
        return row(name, (f"{1e3 * one:,.2f} ms" for one in (was, now)), more)

    prompts = f"{found.batch} × {found.prompt:,} tokens"
    lines = [
        f"{found.model}, {found.pattern}, {found.storage}, head {found.head}; "
        f"on {found.device.name}",
        "",
        f"becomes ternary   {found.weights:,} weights in {found.modules} modules",
        f"stays             {found.other_parameters:,} parameters",
        f"bits a weight     {found.stored_bits:.2f} in the files; the least for {found.pattern} is "
        f"{found.least_bits:.3f}",
        "",
        row("", ("BF16", found.pattern)),
        sizes("weight files", each("file_bytes")),
        sizes("weights on the device", each("device_bytes")),
        sizes(f"KV cache, {found.batch} × {found.context:,}", 2 * [found.kv_bytes]),
        sizes("training state", each("training_bytes")),
        sizes("activations a trained token", each("activation_bytes")),
        row("operations a token", (f"{n / 1e9:,.2f} G" for n in each("operations_per_token"))),
        sizes("read for a decoded token", each("bytes_per_token")),
        times(f"prefill, {prompts}", "prefill"),
        times(f"decode, {found.batch} × 1 token", "decode"),
    ]
    memory = found.device.memory * 1e9
    for name, taken in zip(("BF16", found.pattern), each("device_bytes"), strict=True):
        if memory and taken + found.kv_bytes > memory:
            lines.append(f"{name} does not fit: the device has {readable_bytes(memory)}")
    if found.sharding is not None:
        lines += ["", *_sharded(found.sharding, found.device)]
    if found.price is not None:
        lines += ["", f"at {found.price:g} an hour, a million tokens cost at least"]
        for what, tokens in (("prefill", found.batch * found.prompt), ("decode", found.batch)):
            was, now = (found.price / 3600 * s / tokens * 1e6 for s in each(f"{what}_seconds"))
            saved = f"  {1 - now / was:.0%} saved" if was else ""
            lines.append(row(f"  {what}", (f"{was:.4f}", f"{now:.4f}"), saved))
    return "\n".join([*lines, "", *[f"· {line}" for line in found.assumptions]])


def _sharded(one: Sharding, device: Device) -> list[str]:
    """Training over several GPUs, for people."""
    kept = readable_bytes(one.shard_bytes), readable_bytes(one.whole_bytes)
    sent = readable_bytes(one.gathered_bytes), readable_bytes(one.reduced_bytes)
    hidden = tokens_that_hide(device, one.gpus)
    return [
        f"training on {one.gpus} GPUs, {one.tokens:,} tokens a step, sharded (FSDP2, two bits "
        "gathered):",
        f"  a GPU keeps {kept[0]} of shards and at most {kept[1]} whole, and activations",
        f"  a GPU gathers {sent[0]} and reduces {sent[1]} a micro-batch",
        f"  a step computes {one.compute_seconds:.3g} s and communicates at most "
        f"{one.network_seconds:.3g} s ({one.float32_seconds:.3g} s with float32 gathered)",
        f"  computing takes longer from {hidden:,} tokens a GPU and micro-batch on",
    ]
