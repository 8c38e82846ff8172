"""What training over many GPUs keeps on each, sends, and waits for (FSDP2, ``nn.shard``).

Every linear is gathered as two bits for forward and again for backward; embeddings and head in
float32, once. γ and the norms of blocks, which travel with them, are too few to count. Gradients
are reduced in float32 to the shards. Each micro-batch gathers and reduces again. Nothing is hidden
behind arithmetic, so times bound from above what sharding adds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparse_bitnet.estimate.devices import Device
from sparse_bitnet.packed.sizes import readable_bytes

STATE = 4 + 4 + 8  # bytes a parameter: float32 master and gradient, Adam's two moments
TWO_BITS, FLOAT32 = 0.25, 4
TRAINED = 0.4  # of the bf16 peak that a training step reaches
HOST = 8  # GPUs that share fast links
NETWORK = 50.0  # GB/s of a GPU beyond its host: 400 Gbit/s


@dataclass(frozen=True)
class Sharding:
    """One rank of many, in bytes and seconds."""

    gpus: int
    tokens: int  # of one step, all ranks together, in one micro-batch
    shard_bytes: float  # masters, gradients and moments of its own rows
    # Beside them at the peak: two layers as gathered, one of them as int8 and its gradients twice;
    # the root's parameters and their gradients.
    whole_bytes: float
    gathered_bytes: float  # that a rank receives in a step
    reduced_bytes: float
    compute_seconds: float  # 6 operations a parameter and token at TRAINED of the device's peak
    network_seconds: float
    float32_seconds: float  # if masters were gathered


def sharding(
    weights: int, layers: int, others: int, device: Device, gpus: int, tokens: int
) -> Sharding:
    """The costs of one rank of ``gpus``: ``weights`` are ternary, in ``layers`` equal layers;
    ``others`` are the root's (embeddings, head, last norm); ``tokens`` those of a step."""
    part = (gpus - 1) / gpus
    link = _bytes_per_second(device, gpus)
    gathered = part * (2 * TWO_BITS * weights + FLOAT32 * others)
    reduced = part * FLOAT32 * (weights + others)
    whole32 = part * (2 * FLOAT32 * weights + FLOAT32 * others)
    operations = 6.0 * (weights + others) * tokens
    return Sharding(
        gpus=gpus,
        tokens=tokens,
        shard_bytes=STATE * (weights + others) / gpus,
        whole_bytes=weights / layers * (2 * TWO_BITS + 1 + 2 * FLOAT32) + 2 * FLOAT32 * others,
        gathered_bytes=gathered,
        reduced_bytes=reduced,
        compute_seconds=operations / (gpus * TRAINED * device.bf16 * 1e12),
        network_seconds=(gathered + reduced) / link if gpus > 1 else 0.0,
        float32_seconds=(whole32 + reduced) / link if gpus > 1 else 0.0,
    )


def page_lines(one: Sharding, device: Device) -> list[str]:
    """Training over several GPUs, for people."""
    seconds_a_weight = (2 * TWO_BITS + FLOAT32) / _bytes_per_second(device, one.gpus)
    hidden = math.ceil(seconds_a_weight * TRAINED * device.bf16 * 1e12 / 6)
    return [
        f"training on {one.gpus} GPUs, {one.tokens:,} tokens a step, sharded (FSDP2, two bits "
        "gathered):",
        f"  a GPU keeps {readable_bytes(one.shard_bytes)} of shards and at most "
        f"{readable_bytes(one.whole_bytes)} whole, and activations",
        f"  a GPU gathers {readable_bytes(one.gathered_bytes)} and reduces "
        f"{readable_bytes(one.reduced_bytes)} a micro-batch",
        f"  a step computes {one.compute_seconds:.3g} s and communicates at most "
        f"{one.network_seconds:.3g} s ({one.float32_seconds:.3g} s with float32 gathered)",
        f"  computing takes longer from {hidden:,} tokens a GPU and micro-batch on",
    ]


def _bytes_per_second(device: Device, gpus: int) -> float:
    return 1e9 * (device.link if gpus <= HOST else min(NETWORK, device.link))
