"""Shapes by name, all of the Qwen2 architecture.

The ``qwen2.5-*`` shapes are the published ones (arXiv 2412.15115, table 1, and the released
config.json files). The small ones are for tests, demonstrations and studies; their vocabulary is
that of the data.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import Qwen2Config

from sparse_bitnet.core import ConfigError


@dataclass(frozen=True)
class Shape:
    """A decoder's dimensions. ``vocab_size`` None: taken from the data."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab_size: int | None = None
    positions: int = 32768
    tied: bool = True

    @property
    def linear_weights(self) -> int:
        """Weights in the linears of all blocks: what becomes ternary."""
        attention = self.hidden * self.hidden * (2 + 2 * self.kv_heads / self.heads)
        return int(self.layers * (attention + 3 * self.hidden * self.intermediate))


PRESETS = {
    "tiny": Shape(64, 2, 4, 2, 128),
    "demo": Shape(128, 4, 4, 2, 384),
    "study-1m": Shape(128, 6, 2, 1, 384),
    "study-5m": Shape(256, 6, 4, 2, 768),
    "study-20m": Shape(512, 6, 8, 4, 1664),
    "qwen2.5-0.5b": Shape(896, 24, 14, 2, 4864, vocab_size=151936),
    "qwen2.5-1.5b": Shape(1536, 28, 12, 2, 8960, vocab_size=151936),
    "qwen2.5-3b": Shape(2048, 36, 16, 2, 11008, vocab_size=151936),
    "qwen2.5-7b": Shape(3584, 28, 28, 4, 18944, vocab_size=152064, tied=False),
}


def preset_config(name: str, vocab_size: int | None = None) -> Qwen2Config:
    """The transformers configuration of a preset.

    Args:
        name: a key of ``PRESETS``.
        vocab_size: rows of the embedding; required where the preset does not publish one.

    Raises:
        ConfigError: for an unknown name, or a vocabulary that is missing.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r} is unknown; choose among {', '.join(PRESETS)}")
    shape = PRESETS[name]
    rows = vocab_size or shape.vocab_size
    if rows is None:
        raise ConfigError(f"preset {name} takes its vocabulary from the data: give --vocab-size")
    return Qwen2Config(
        vocab_size=rows,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.positions,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=shape.tied,
        use_cache=True,
        bos_token_id=None,
        eos_token_id=None,
    )
