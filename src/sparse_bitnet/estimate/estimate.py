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
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparse_bitnet.core import CheckpointError, ConfigError, Pattern
from sparse_bitnet.estimate.devices import Device, device_named
from sparse_bitnet.estimate.sharding import Sharding
from sparse_bitnet.formats import StorageName
from sparse_bitnet.kernels import native
from sparse_bitnet.nn import convert, converted_modules
from sparse_bitnet.packed.load import DType
from sparse_bitnet.packed.sizes import least_bits, readable_bytes
from sparse_bitnet.packed.write import HeadName, packed_sizes
from sparse_bitnet.train.dense import read_shape
from sparse_bitnet.train.presets import PRESETS, preset_config

# What autograd keeps of a decoder layer in an eager step under bf16 autocast, bytes a token:
# a·hidden + b·intermediate + c·key-value width + d, counted with saved-tensor hooks.
KEPT = {"bitnet": (26.25, 7.0, 4.0, 36.0), "bf16": (30.25, 8.0, 4.0, 8.0)}


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
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * self.layers
        # Tokens that each layer keeps at most: all (None), a window, or none (linear attention,
        # Mamba, convolutions).
        self.windows = [
            0
            if not kind.endswith("attention") or kind == "linear_attention"
            else window
            if kind == "sliding_attention"
            else None
            for kind in kinds
        ]

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


@dataclass(frozen=True)
class Cost:
    """One way to run: the model in BF16, or packed. Sizes in bytes, times in seconds."""

    file_bytes: int
    device_bytes: int  # weights on the device, as products read them
    prefill_seconds: float  # all sequences' prompts together
    prefill_bound: str  # what takes longer: arithmetic or memory
    decode_seconds: float  # one token of every sequence
    decode_bound: str
    operations_per_token: float  # without attention
    bytes_per_token: float  # read to decode one token: weights and KV cache
    training_bytes: int  # masters, Adam's moments, gradients; ternary weights kept for backward
    activation_bytes: float  # that training keeps for backward, a token


@dataclass(frozen=True)
class Estimate:
    """What :func:`estimate` found; ``str()`` is a page for people."""

    weights: int  # that become ternary, in so many modules
    modules: int
    other_parameters: int  # embeddings, norms, head and biases; tied ones once
    stored_bits: float  # a weight in the files, scales included
    kv_bytes: int  # all sequences
    bf16: Cost
    packed: Cost
    sharding: Sharding | None  # of training over several GPUs
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

    def roofline(
        tokens: int, length: int, packed: bool, decoding: bool
    ) -> tuple[float, str, float]:
        """(seconds, what bounds them, bytes read): linears, head on each last token, attention."""
        kept = shape.kv_lengths(length)
        seen = sum(kept if decoding else (n * (n + 1) / 2 + (length - n) * n for n in kept))
        # (bf16 operations, int8 operations, bytes) of each product
        products: list[tuple[float, float, float]] = [
            (4 * shape.query_width * seen * batch, 0.0, batch * shape.kv_bytes(length))
        ]
        of_head = 2 * shape.head * batch
        if packed and head == "int8":  # two int8 terms a token
            products.append((0.0, 2 * of_head, shape.head))
        else:
            products.append((of_head, 0.0, shape.head_bytes if packed else 2 * shape.head))
        for count, active in linears:
            operations = 2 * count * active * tokens
            # Of experts, every token may meet others, up to all of them.
            read = count * min(1.0, active * tokens)
            products.append(
                (0.0, operations, stored * read) if packed else (operations, 0.0, 2 * read)
            )
        limits = [
            (bf16 / device.bf16 / 1e12 + int8 / device.int8 / 1e12, read / device.bandwidth / 1e9)
            for bf16, int8, read in products
        ]
        arithmetic, memory = map(sum, zip(*limits, strict=True))
        bound = "arithmetic" if arithmetic > memory else "memory"
        return sum(map(max, limits)), bound, sum(read for _, _, read in products)

    def cost(packed: bool) -> Cost:
        decode, decode_bound, read = roofline(batch, context, packed, decoding=True)
        files = sizes.file_bytes if packed else 2 * parameters
        a, b, c, d = KEPT["bitnet" if packed else "bf16"]
        return Cost(
            files,
            int(stored * weights + 4 * rows + sizes.other_bytes) if packed else files,
            *roofline(batch * prompt, prompt, packed, decoding=False)[:2],
            decode,
            decode_bound,
            operations_per_token=2
            * (sum(count * active for count, active in linears) + shape.head),
            bytes_per_token=read / batch,
            # Backward reads the ternary weights too.
            training_bytes=16 * parameters + packed * weights // (4 if device.is_gpu else 1),
            activation_bytes=shape.layers
            * (a * shape.hidden + b * shape.intermediate + c * shape.kv_width + d),
        )

    both = bf16, packed = cost(packed=False), cost(packed=True)
    kv_bytes, stored_bits = batch * shape.kv_bytes(context), 8 * sizes.packed_bytes / weights
    others = parameters - weights
    shards = Sharding(weights, shape.layers, others, device, gpus, step) if gpus > 1 else None

    def row(name: str, texts: Iterable[str], more: str = "") -> str:
        return f"{name:32}" + "".join(f"{text:>12}" for text in texts) + more

    def each(name: str, what: str) -> str:
        return row(name, (readable_bytes(getattr(cost, what)) for cost in both))

    def times(name: str, what: str) -> str:
        was, now = (getattr(cost, f"{what}_seconds") for cost in both)
        more = f"  {was / now:.2f}×, bound by {getattr(packed, f'{what}_bound')}"
        return row(name, (f"{1e3 * one:,.2f} ms" for one in (was, now)), more)

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
        each("weight files", "file_bytes"),
        each("weights on the device", "device_bytes"),
        row(f"KV cache, {batch} × {context:,}", 2 * [readable_bytes(kv_bytes)]),
        each("training state", "training_bytes"),
        each("activations a trained token", "activation_bytes"),
        row("operations a token", (f"{c.operations_per_token / 1e9:,.2f} G" for c in both)),
        each("read for a decoded token", "bytes_per_token"),
        times(f"prefill, {batch} × {prompt:,} tokens", "prefill"),
        times(f"decode, {batch} × 1 token", "decode"),
    ]
    memory = device.memory * 1e9
    for name, one in {"BF16": bf16, str(parsed): packed}.items():
        if memory and one.device_bytes + kv_bytes > memory:
            lines.append(f"{name} does not fit: the device has {readable_bytes(memory)}")
    if shards is not None:
        lines += ["", str(shards)]
    if price is not None:
        lines += ["", f"at {price:g} an hour, a million tokens cost at least"]
        for what, tokens in (("prefill", batch * prompt), ("decode", batch)):
            spent = [price / 3600 * getattr(c, f"{what}_seconds") / tokens * 1e6 for c in both]
            saved = f"  {1 - spent[1] / spent[0]:.0%} saved" if spent[0] else ""
            lines.append(row(f"  {what}", (f"{one:.4f}" for one in spent), saved))
    assumed = _assumptions(device, shape.active_experts < 1)
    page = "\n".join([*lines, "", *[f"· {line}" for line in assumed]])
    return Estimate(
        weights, len(linears), others, stored_bits, kv_bytes, bf16, packed, shards, page
    )


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
    except (ConfigError, CheckpointError):
        raise
    except Exception as error:  # whatever a foreign config.json makes transformers raise
        raise ConfigError(
            f"{source}: transformers cannot build a model of this config.json: {str(error)[:300]}"
        ) from error


def _assumptions(device: Device, has_experts: bool) -> list[str]:
    """What every figure of an estimate rests on."""
    bf16, int8 = (f"{r:,.1f}" if r >= 1 else f"{r:.2g}" for r in (device.bf16, device.int8))
    lines = [
        f"{device.name}: {bf16} TFLOPS bf16, {int8} TOPS int8, {device.bandwidth:,.0f} GB/s "
        f"({device.source})",
        "times are rooflines, products one after the other, each bound by arithmetic or by reading "
        "its weight; norms, activations and launches are free",
    ]
    if device.is_gpu:
        lines += [
            "whole 7B models measured on an H200: prefill 1.92×, decode 2.9× for one sequence and "
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
