"""An estimate in words: the page for people, and what it rests on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparse_bitnet.core import Pattern
from sparse_bitnet.deploy.estimate.devices import Device
from sparse_bitnet.deploy.packed.sizes import readable_bytes

if TYPE_CHECKING:
    from sparse_bitnet.deploy.estimate.estimate import Estimate


def assumptions(device: Device, pattern: Pattern, has_experts: bool) -> list[str]:
    """What every figure of an estimate rests on."""
    lines = [
        f"{device.name}: {device.bf16:,.1f} TFLOPS bf16, {device.int8:,.1f} TOPS int8, "
        f"{device.bandwidth:,.0f} GB/s ({device.source})",
        "times are rooflines, products one after the other, each bound by arithmetic or by reading "
        "its weight; norms, activations and launches are free",
        "the BF16 twin runs the same products in bf16; attention and KV cache are bf16 in both",
        "training: float32 masters, gradients and two Adam moments, 16 bytes a parameter; "
        "activations as autograd keeps them without checkpointing, logits in chunks",
    ]
    if device.is_gpu:
        lines.insert(
            2,
            "whole 7B models measured on an H200 gain less, as kernels reach 0.7 of the bf16 peak, "
            "0.6 of the int8 one and 0.5 of the sparse one: prefill 1.7× at 6:8 and 2.2× at 2:4, "
            "decode 3.4× for one sequence and 2.3× for sixteen",
        )
        lines.insert(
            3,
            "up to 32 tokens two-bit rows are read, beyond tensor cores' layouts, and all of them "
            "are kept in memory",
        )
        if not pattern.is_dense:
            lines.insert(4, "sparse tensor cores multiply twice as fast as dense ones")
    if has_experts:
        lines.append("tokens meet different experts until all are met; routing is free")
    return lines


def describe(found: Estimate) -> str:
    """The page."""
    bf16, packed = found.bf16, found.packed
    lines = [
        f"{found.model}, {found.pattern}, {found.storage}, head {found.head}; "
        f"on {found.device.name}",
        "",
        f"becomes ternary   {found.weights:,} weights in {found.modules} modules",
        f"stays             {found.other_parameters:,} parameters",
        f"bits a weight     {found.stored_bits:.2f} in the files; the least for {found.pattern} is "
        f"{found.least_bits:.3f}",
        "",
        f"{'':32}{'BF16':>12}{found.pattern:>12}",
        _sizes("weight files", bf16.file_bytes, packed.file_bytes),
        _sizes("weights on the device", bf16.device_bytes, packed.device_bytes),
        _sizes(f"KV cache, {found.batch} × {found.context:,}", found.kv_bytes, found.kv_bytes),
        _sizes("training state", bf16.training_bytes, packed.training_bytes),
        _sizes("activations a trained token", bf16.activation_bytes, packed.activation_bytes),
        _row("operations a token", *[_giga(c.operations_per_token) for c in (bf16, packed)]),
        _sizes("read for a decoded token", bf16.bytes_per_token, packed.bytes_per_token),
        _times(
            f"prefill, {found.batch} × {found.prompt:,} tokens",
            bf16.prefill_seconds,
            packed.prefill_seconds,
            packed.prefill_bound,
        ),
        _times(
            f"decode, {found.batch} × 1 token",
            bf16.decode_seconds,
            packed.decode_seconds,
            packed.decode_bound,
        ),
    ]
    memory = found.device.memory * 1e9
    for name, cost in (("BF16", bf16), (found.pattern, packed)):
        if memory and cost.device_bytes + found.kv_bytes > memory:
            lines.append(f"{name} does not fit: the device has {readable_bytes(memory)}")
    if found.price is not None:
        lines += ["", f"at {found.price:g} an hour, a million tokens cost at least"]
        for what in ("prefill", "decode"):
            was, now = (getattr(cost, f"{what}_price") for cost in (bf16, packed))
            saved = f"  {1 - now / was:.0%} saved" if was else ""
            lines.append(_row(f"  {what}", f"{was:.4f}", f"{now:.4f}") + saved)
    return "\n".join([*lines, "", *[f"· {line}" for line in found.assumptions]])


def _row(name: str, bf16: str, packed: str) -> str:
    return f"{name:32}{bf16:>12}{packed:>12}"


def _sizes(name: str, bf16: float, packed: float) -> str:
    return _row(name, readable_bytes(bf16), readable_bytes(packed))


def _giga(count: float) -> str:
    return f"{count / 1e9:,.2f} G"


def _times(name: str, bf16: float, packed: float, bound: str) -> str:
    row = _row(name, f"{1e3 * bf16:,.2f} ms", f"{1e3 * packed:,.2f} ms")
    return f"{row}  {bf16 / packed:.2f}×, bound by {bound}"
