"""What training over many GPUs keeps on each, sends, and waits for (FSDP2, ``nn.shard``).

Every linear is gathered as two bits for forward and again for backward; embeddings and head in
float32, once. γ and the norms of blocks, which travel with them, are too few to count. Gradients
are reduced in float32 to the shards. Each micro-batch gathers and reduces again. Nothing is hidden
behind arithmetic, so times bound from above what sharding adds.
"""

from __future__ import annotations

import math

from sparse_bitnet.estimate.devices import Device
from sparse_bitnet.packed.sizes import readable_bytes

STATE = 4 + 4 + 8  # bytes a parameter: float32 master and gradient, Adam's two moments
TWO_BITS, FLOAT32 = 0.25, 4
TRAINED = 0.4  # of the bf16 peak that a training step reaches
HOST = 8  # GPUs that share fast links
NETWORK = 50.0  # GB/s of a GPU beyond its host: 400 Gbit/s


class Sharding:
    """The costs of one rank of ``gpus``, in bytes and seconds; ``str()`` is a page for people.

    Args:
        weights: that are ternary, in ``layers`` equal layers.
        others: parameters of the root: embeddings, head, last norm.
        tokens: of a step, all ranks together, in one micro-batch.
    """

    def __init__(
        self, weights: int, layers: int, others: int, device: Device, gpus: int, tokens: int
    ) -> None:
        part, every = (gpus - 1) / gpus, weights + others
        link = 1e9 * (device.link if gpus <= HOST else min(NETWORK, device.link))
        speed = TRAINED * device.bf16 * 1e12
        self.gpus, self.tokens = gpus, tokens
        # Masters, gradients and moments of its own rows.
        self.shard_bytes = STATE * every / gpus
        # Beside them at the peak: two layers as gathered, one of them as int8 and its gradients
        # twice; the root's parameters and their gradients.
        a_layer = weights / layers * (2 * TWO_BITS + 1 + 2 * FLOAT32)
        self.whole_bytes = a_layer + 2 * FLOAT32 * others
        # That a rank receives in a step.
        self.gathered_bytes = part * (2 * TWO_BITS * weights + FLOAT32 * others)
        self.reduced_bytes = part * FLOAT32 * every
        self.compute_seconds = 6.0 * every * tokens / gpus / speed
        self.network_seconds = (self.gathered_bytes + self.reduced_bytes) / link
        # If masters were gathered.
        gathered32 = part * (2 * FLOAT32 * weights + FLOAT32 * others)
        self.float32_seconds = (gathered32 + self.reduced_bytes) / link
        # From so many tokens a GPU and micro-batch on, computing takes longer.
        self.hiding_tokens = math.ceil((2 * TWO_BITS + FLOAT32) / link * speed / 6)

    def __str__(self) -> str:
        return (
            f"training on {self.gpus} GPUs, {self.tokens:,} tokens a step, sharded (FSDP2, two "
            "bits gathered):\n"
            f"  a GPU keeps {readable_bytes(self.shard_bytes)} of shards and at most "
            f"{readable_bytes(self.whole_bytes)} whole, and activations\n"
            f"  a GPU gathers {readable_bytes(self.gathered_bytes)} and reduces "
            f"{readable_bytes(self.reduced_bytes)} a micro-batch\n"
            f"  a step computes {self.compute_seconds:.3g} s and communicates at most "
            f"{self.network_seconds:.3g} s ({self.float32_seconds:.3g} s with float32 gathered)\n"
            f"  computing takes longer from {self.hiding_tokens:,} tokens a GPU and micro-batch on"
        )
