"""Shapes of a decoder, and the time that its products take at a device's ceilings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedModel

from sparse_bitnet.deploy.estimate.devices import Device
from sparse_bitnet.deploy.packed.packing import HeadName
from sparse_bitnet.formats import StorageName, windows
from sparse_bitnet.kernels import native
from sparse_bitnet.nn import DerivedModule

MOST_PACKED_TOKENS = 32
"""Up to so many tokens at once the two-bit layout is read; beyond, tensor cores' own layouts."""
COMPRESSED = 0.625
"""Bytes a lane of a 2:4 compressed int8 weight: half the values and two bits to place each."""
SIX_BIT = 1.5 / 8
"""Bytes a weight of 2:4 on a CPU."""
KEPT = {"bitnet": (26.25, 7.0, 4.0, 36.0), "bf16": (30.25, 8.0, 4.0, 8.0)}
"""What autograd keeps of a decoder layer in an eager step under bf16 autocast, bytes a token:
a·hidden + b·intermediate + c·key-value width + d, counted with saved-tensor hooks."""


class DecoderShape:
    """What a decoder's configuration says beside its linears."""

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
        self.head = head.weight.numel()
        self.head_bytes = head.weight.nbytes
        self.tied = head.weight is model.get_input_embeddings().weight
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * self.layers
        self.windows = [
            window if kind == "sliding_attention" else None if _keeps_keys(kind) else 0
            for kind in kinds
        ]

    def kv_lengths(self, context: int) -> list[int]:
        """Tokens that each layer keeps of that many."""
        return [context if window is None else min(context, window) for window in self.windows]

    def kv_bytes(self, context: int) -> int:
        """Of one sequence: keys and values in bfloat16."""
        return sum(2 * 2 * self.kv_width * length for length in self.kv_lengths(context))

    def kept_bytes(self, kind: Literal["bitnet", "bf16"]) -> float:
        a, b, c, d = KEPT[kind]
        layer = a * self.hidden + b * self.intermediate + c * self.kv_width + d
        return self.layers * layer


def _keeps_keys(kind: str) -> bool:
    """Whether a layer of that kind has a KV cache: not linear attention, Mamba, convolutions."""
    return kind.endswith("attention") and kind != "linear_attention"


@dataclass(frozen=True)
class Linear:
    """One converted module: its weights, the part of them a token meets, lanes read of each."""

    weights: int
    active: float
    lanes: float | None  # compressed 2:4 lanes a weight: 1 for 2:4, 1.5 for 6:8; None if neither
    pairs: bool  # 2:4, or sparser
    experts: bool

    def layouts(self, device: Device, tokens: int) -> list[tuple[float, float]]:
        """``(bytes a weight, arithmetic relative to dense int8)`` of what could be read."""
        if self.experts or (not device.is_gpu and native.path() == native.REFERENCE):
            return [(1.0, 1.0)]
        if not device.is_gpu:
            return [(SIX_BIT if self._six_bit else 0.25, 1.0)]
        found = [(1.0, 1.0)]
        if tokens <= MOST_PACKED_TOKENS:
            found.append((0.25, 1.0))
        if self.lanes is not None:
            found.append((COMPRESSED * self.lanes, self.lanes / device.sparse))
        return found

    def device_bytes(self, device: Device, storage: StorageName) -> float:
        """Beside the stored bytes: all layouts; a CPU reads two-bit bytes as they are stored."""
        layouts = self.layouts(device, 1)
        if not device.is_gpu and storage == "two-bit" and layouts[0][0] == 0.25:
            return 0.0
        return self.weights * sum(size for size, _ in layouts)

    @property
    def _six_bit(self) -> bool:
        return self.pairs and native.reads_six_bit()


def linear_of(shape: DecoderShape, module: DerivedModule) -> Linear:
    masters = list(module.master_parameters().values())
    pattern, columns = module.pattern, masters[0].shape[-1]
    pairs = not pattern.is_dense and pattern.n <= 2 and pattern.m % 4 == 0
    group = None if pattern.is_dense else windows.group_for(pattern, columns)
    lanes = 1.0 if pairs else (2 * group - 4) / group if group else None
    experts = masters[0].dim() == 3
    return Linear(
        weights=sum(weight.numel() for weight in masters),
        active=shape.active_experts if experts else 1.0,
        lanes=lanes,
        pairs=pairs,
        experts=experts,
    )


@dataclass(frozen=True)
class Time:
    arithmetic: float
    memory: float
    seconds: float
    bytes: float

    @property
    def bound(self) -> str:
        return "arithmetic" if self.arithmetic > self.memory else "memory"


class Run:
    """Products one after the other, each at the device's roofline."""

    def __init__(
        self,
        device: Device,
        shape: DecoderShape,
        linears: list[Linear],
        packed: bool,
        head: HeadName,
        batch: int,
    ) -> None:
        self.device, self.shape, self.linears = device, shape, linears
        self.packed, self.batch = packed, batch
        self.int8_head = packed and head == "int8"

    def prefill(self, prompt: int) -> Time:
        """All prompts; logits of each one's last token."""
        shape = self.shape
        seen = sum(
            length * (length + 1) / 2 + (prompt - length) * length
            for length in shape.kv_lengths(prompt)
        )
        attention = self._product(
            4 * shape.query_width * seen * self.batch, 0, self.batch * shape.kv_bytes(prompt)
        )
        return self._sum([*self._linears(self.batch * prompt), self._head(), attention])

    def decode(self, context: int) -> Time:
        """One token of every sequence, after ``context`` tokens."""
        shape = self.shape
        seen = sum(shape.kv_lengths(context))
        attention = self._product(
            4 * shape.query_width * seen * self.batch, 0, self.batch * shape.kv_bytes(context)
        )
        return self._sum([*self._linears(self.batch), self._head(), attention])

    def _linears(self, tokens: int) -> list[Time]:
        times = []
        for linear in self.linears:
            operations = 2 * linear.weights * linear.active * tokens
            # Of experts, every token may meet others, up to all of them.
            read = linear.weights * min(1.0, linear.active * tokens)
            if not self.packed:
                times.append(self._product(operations, 0, 2 * read))
                continue
            choices = [
                self._product(0, operations * factor, size * read)
                for size, factor in linear.layouts(self.device, tokens)
            ]
            times.append(min(choices, key=lambda time: time.seconds))
        return times

    def _head(self) -> Time:
        operations = 2 * self.shape.head * self.batch
        if self.int8_head:  # two int8 terms a token
            return self._product(0, 2 * operations, self.shape.head)
        read = self.shape.head_bytes if self.packed else 2 * self.shape.head
        return self._product(operations, 0, read)

    def _product(self, bf16: float, int8: float, read: float) -> Time:
        arithmetic = bf16 / (self.device.bf16 * 1e12) + int8 / (self.device.int8 * 1e12)
        memory = read / (self.device.bandwidth * 1e9)
        return Time(arithmetic, memory, max(arithmetic, memory), read)

    def _sum(self, times: list[Time]) -> Time:
        return Time(
            sum(time.arithmetic for time in times),
            sum(time.memory for time in times),
            sum(time.seconds for time in times),
            sum(time.bytes for time in times),
        )
