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

STATE = 4 + 4 + 8  # bytes a parameter: float32 master and gradient, Adam's two moments
TWO_BITS, FLOAT32 = 0.25, 4
TRAINED = 0.4  # of the bf16 peak that a training step reaches
HOST = 8  # GPUs that share fast links
NETWORK = 50.0  # GB/s of a GPU beyond its host: 400 Gbit/s


@dataclass(frozen=True)
class Sharding:
    """One rank of many, in bytes and seconds.

    Attributes:
        gpus: ranks.
        tokens: of one step, all ranks together, in one micro-batch.
        shard_bytes: masters, gradients and moments of its own rows.
        whole_bytes: beside them at the peak: two layers as gathered, one of them as int8 and its
            gradients twice; the root's parameters and their gradients.
        gathered_bytes, reduced_bytes: what a rank receives and what it reduces in a step.
        compute_seconds: 6 operations a parameter and token at ``TRAINED`` of the device's peak.
        network_seconds: gathering and reducing; ``float32_seconds`` if masters were gathered.
    """

    gpus: int
    tokens: int
    shard_bytes: float
    whole_bytes: float
    gathered_bytes: float
    reduced_bytes: float
    compute_seconds: float
    network_seconds: float
    float32_seconds: float


def sharding(
    weights: int, layers: int, others: int, device: Device, gpus: int, tokens: int
) -> Sharding:
    """The costs of one rank.

    Args:
        weights: ternary ones, in ``layers`` equal layers.
        others: parameters of the root: embeddings, head, last norm.
        device: a GPU with links.
        gpus: ranks; up to 8 share a host.
        tokens: of one step.
    """
    layer = weights / layers
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
        whole_bytes=layer * (2 * TWO_BITS + 1 + 2 * FLOAT32) + 2 * FLOAT32 * others,
        gathered_bytes=gathered,
        reduced_bytes=reduced,
        compute_seconds=operations / (gpus * TRAINED * device.bf16 * 1e12),
        network_seconds=(gathered + reduced) / link if gpus > 1 else 0.0,
        float32_seconds=(whole32 + reduced) / link if gpus > 1 else 0.0,
    )


def tokens_that_hide(device: Device, gpus: int) -> int:
    """Tokens a GPU and micro-batch from which computing takes longer than the network."""
    seconds_a_weight = (2 * TWO_BITS + FLOAT32) / _bytes_per_second(device, gpus)
    return math.ceil(seconds_a_weight * TRAINED * device.bf16 * 1e12 / 6)


def _bytes_per_second(device: Device, gpus: int) -> float:
    return 1e9 * (device.link if gpus <= HOST else min(NETWORK, device.link))
