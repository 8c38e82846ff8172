"""What a Sparse-BitNet model would take and gain, from its configuration alone.

The model is built on the meta device and converted there, so shapes are real and nothing is
allocated. File sizes come from the code that packs. Times are rooflines: each product takes as
long as its arithmetic or its memory traffic at the device's peak, whichever is longer, so they
bound from below what any kernel can do.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparse_bitnet.core import ConfigError, Pattern
from sparse_bitnet.deploy.estimate.devices import Device, device_named
from sparse_bitnet.deploy.estimate.roofline import DecoderShape, Run, linear_of
from sparse_bitnet.deploy.estimate.text import assumptions, describe
from sparse_bitnet.deploy.packed.packing import HeadName, packed_sizes
from sparse_bitnet.deploy.packed.pretrained import DType
from sparse_bitnet.deploy.packed.sizes import least_bits
from sparse_bitnet.formats import StorageName
from sparse_bitnet.nn import convert, converted_modules
from sparse_bitnet.train.dense import read_shape
from sparse_bitnet.train.presets import PRESETS, preset_config


@dataclass(frozen=True)
class Cost:
    """One way to run: the model in BF16, or packed.

    Attributes:
        file_bytes: of the weight files.
        device_bytes: of weights on the device, with the layouts that products read.
        prefill_seconds: for all sequences' prompts together.
        decode_seconds: for one token of every sequence.
        prefill_bound, decode_bound: what takes longer, ``"arithmetic"`` or ``"memory"``.
        operations_per_token: multiplications and additions, without attention.
        bytes_per_token: read from memory to decode, of weights and KV cache, for one token.
        training_bytes: master weights, Adam's moments, gradients, weights derived from the masters.
        activation_bytes: that training keeps for backward, a token.
        prefill_price, decode_price: of a million tokens; None without a price.
    """

    file_bytes: int
    device_bytes: int
    prefill_seconds: float
    decode_seconds: float
    prefill_bound: str
    decode_bound: str
    operations_per_token: float
    bytes_per_token: float
    training_bytes: int
    activation_bytes: float
    prefill_price: float | None = None
    decode_price: float | None = None


@dataclass(frozen=True)
class Estimate:
    """What :func:`estimate` found; ``str()`` is a page for people.

    Attributes:
        model, pattern, storage, head: as asked.
        device: whose ceilings these are.
        prompt, context, batch: tokens of a prompt; in the KV cache while decoding; sequences.
        weights, modules: how many become ternary, in how many modules.
        other_parameters: embeddings, norms, head and biases; tied ones once.
        stored_bits: a weight in the files, scales included.
        least_bits: that any lossless code of the pattern needs.
        kv_bytes: of the cache, all sequences.
        bf16, packed: the two ways to run.
        price: of the device, an hour.
        assumptions: what all of this rests on.
    """

    model: str
    pattern: str
    storage: str
    head: str
    device: Device
    prompt: int
    context: int
    batch: int
    weights: int
    modules: int
    other_parameters: int
    stored_bits: float
    least_bits: float
    kv_bytes: int
    bf16: Cost
    packed: Cost
    price: float | None
    assumptions: list[str]

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return describe(self)


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
) -> Estimate:
    """Memory, arithmetic and best possible times of a model, before anyone trains it.

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

    Raises:
        ConfigError: if the model cannot be found or built, or a number is out of range.
        PatternError: if the pattern is malformed or does not divide a weight.
    """
    for name, value in (("prompt", prompt), ("context", context), ("batch", batch)):
        if value < 1:
            raise ConfigError(f"estimate: {name} is {value}; it has to be 1 or more")
    if price is not None and not 0 <= price < math.inf:
        raise ConfigError(f"estimate: price is {price}; it has to be 0 or more")
    parsed = Pattern.parse(pattern)
    device = device_named(gpu)
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
    linears = [linear_of(shape, module) for _, module in converted_modules(skeleton)]
    derived = sum(
        b.nbytes for _, m in converted_modules(skeleton) for b in m.buffers(recurse=False)
    )
    weights = sum(linear.weights for linear in linears)
    kv_bytes = batch * shape.kv_bytes(context)

    def cost(packed: bool) -> Cost:
        run = Run(device, shape, linears, packed, head, batch)
        prefill, decode = run.prefill(prompt), run.decode(context)
        layouts = sum(linear.device_bytes(device, storage) for linear in linears)
        other = sizes.other_bytes
        files = sizes.file_bytes if packed else 2 * dense_parameters
        state = dense_parameters * (4 + 4 + 8)
        return Cost(
            file_bytes=files,
            device_bytes=int(sizes.packed_bytes + other + layouts) if packed else files,
            prefill_seconds=prefill.seconds,
            decode_seconds=decode.seconds,
            prefill_bound=prefill.bound,
            decode_bound=decode.bound,
            operations_per_token=2 * (sum(x.weights * x.active for x in linears) + shape.head),
            bytes_per_token=decode.bytes / batch,
            training_bytes=state + (derived if packed else 0),
            activation_bytes=shape.kept_bytes("bitnet" if packed else "bf16"),
            prefill_price=_per_million(price, prefill.seconds, batch * prompt),
            decode_price=_per_million(price, decode.seconds, batch),
        )

    return Estimate(
        model=model,
        pattern=str(parsed),
        storage=storage,
        head=f"{head}{', shared with the embedding' if shape.tied else ''}",
        device=device,
        prompt=prompt,
        context=context,
        batch=batch,
        weights=weights,
        modules=len(linears),
        other_parameters=dense_parameters - weights,
        stored_bits=8 * sizes.packed_bytes / weights,
        least_bits=least_bits(parsed),
        kv_bytes=kv_bytes,
        bf16=cost(packed=False),
        packed=cost(packed=True),
        price=price,
        assumptions=assumptions(device, parsed, shape.active_experts < 1),
    )


def _per_million(price: float | None, seconds: float, tokens: int) -> float | None:
    return None if price is None else price * seconds / 3600 / tokens * 1e6


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
