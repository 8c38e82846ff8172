"""The model of a run: built from a preset or a config.json, or read from a directory; converted."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sparse_bitnet.console import say
from sparse_bitnet.core import CheckpointError, ConfigError, DataError
from sparse_bitnet.data.tokenizer import extends, has_tokenizer, load_tokenizer
from sparse_bitnet.nn import Conversion, convert
from sparse_bitnet.nn.convert import patterns_of_modules
from sparse_bitnet.nn.sub_norm import add_sub_norms
from sparse_bitnet.train.config import ModelConfig, SparsityConfig
from sparse_bitnet.train.dense import IMPORT_FIRST, is_gguf, read_dense, read_shape
from sparse_bitnet.train.presets import PRESETS, preset_config

MASKLESS = "sparse_bitnet_maskless_sdpa"


def context_length(config: PreTrainedConfig) -> int | None:
    """Tokens that a model reads at once, if it has positions to run out of."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def build_model(
    config: ModelConfig,
    *,
    vocab_size: int,
    seed: int,
    device: torch.device,
    tokenizer: PreTrainedTokenizerBase | None = None,
    sample: Callable[[], Tensor] | None = None,
) -> PreTrainedModel:
    """A float32 causal language model on ``device``, not converted yet.

    The same seed gives the same weights on one kind of device, on every rank.

    Args:
        vocab_size: how many token ids the data uses.
        tokenizer: the data's. Its end-of-sequence and padding ids go into the configuration of a
            model from scratch; that of a directory must be the same, but for added tokens.
        sample: gives token ids ``[sequences, length]`` of the data, for ``sub_norms``.

    Raises:
        ConfigError: if the source is no preset, directory or config.json, cannot be read, has
            fewer embedding rows than the data needs, or another tokenizer.
    """
    directory = Path(config.source)
    from_weights = config.source not in PRESETS and directory.is_dir()
    # Left out, transformers takes sdpa where an architecture has it (Gemma2 and Mamba have not).
    attention = None if config.attention == "sdpa" else config.attention
    if from_weights and config.vocab_size:
        raise ConfigError(f"model.vocab_size cannot change the vocabulary of {config.source}")
    try:
        if from_weights:
            model = read_dense(directory, attn_implementation=attention)
            model = model.to(device)  # type: ignore[arg-type]  # transformers wraps nn.Module.to
        else:
            if is_gguf(directory):
                raise ConfigError(f"model.source {directory} {IMPORT_FIRST}")
            published = PRESETS[config.source].vocab_size if config.source in PRESETS else None
            shape = _shape(config.source, config.vocab_size or published or vocab_size)
            if config.vocab_size:
                shape.vocab_size = config.vocab_size
            torch.manual_seed(seed)
            with torch.device(device):
                model = AutoModelForCausalLM.from_config(
                    shape, dtype=torch.float32, attn_implementation=attention
                )
    except (OSError, ValueError, KeyError, CheckpointError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"model.source {config.source}: {error}") from error
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < vocab_size:
        raise ConfigError(
            f"model.source {config.source} has {rows} embedding rows, but the data's tokenizer "
            f"needs {vocab_size}: prepare the data with the model's own tokenizer"
        )
    if from_weights and tokenizer is not None:
        _check_tokenizer(directory, tokenizer)
    if config.sub_norms:
        if not from_weights or sample is None:
            raise ConfigError("model.sub_norms is for a start from a directory's weights")
        model = add_sub_norms(model, sample())
    if tokenizer is not None and not from_weights:
        for settings in (model.config, model.generation_config):
            settings.eos_token_id = tokenizer.eos_token_id
            settings.bos_token_id = tokenizer.bos_token_id
            settings.pad_token_id = tokenizer.pad_token_id
    if config.activation_checkpointing:
        # transformers is renaming it; both spellings stand until version 6.
        older = model.gradient_checkpointing_enable
        enable = getattr(model, "activation_checkpointing_enable", older)
        enable({"use_reentrant": False})
    return model.train()


def _shape(source: str, vocab_size: int | None) -> Any:
    if source in PRESETS:
        return preset_config(source, vocab_size)
    if not Path(source).exists():
        raise ConfigError(
            f"model {source!r} is no preset ({', '.join(PRESETS)}), no Hugging Face directory and "
            "no config.json"
        )
    return read_shape(source)


def empty_model(source: str, vocab_size: int | None, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a preset, directory or ``config.json`` on the meta device: shapes, no weights.

    Raises:
        ConfigError: if there is none, or transformers cannot build a model of it.
    """
    try:
        config = _shape(source, vocab_size)
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


@contextlib.contextmanager
def maskless_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model with ``sdpa`` rely on the kernel's own causal mask while this is open.

    transformers asks the device at every forward whether sequences are packed, and waits for the
    answer: a GPU then never has its next step queued. An attention implementation that it knows no
    mask function for is asked nothing. Training's sequences are whole and unpadded, so there is
    nothing to mask but the future. Models with sliding windows keep their masks.
    """
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    plain = kinds == {"full_attention"} and not any(windows)
    if not plain or config._attn_implementation != "sdpa":
        yield
        return
    AttentionInterface.register(MASKLESS, sdpa_attention_forward)
    model.set_attn_implementation(MASKLESS)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


def _check_tokenizer(directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse weights that know other token ids than the data has; those of tokens that the data's
    tokenizer was given besides, for a chat template perhaps, are learned."""
    try:
        own = load_tokenizer(directory) if has_tokenizer(directory) else None
    except DataError as error:  # one with code of its own, for which the data's stands in
        say(f"warning: model.source: its tokenizer is not compared with the data's: {error}")
        return
    if own is not None and not extends(tokenizer, own):
        raise ConfigError(
            f"model.source {directory} has another tokenizer than the data: prepare the data with "
            f"its own (data prepare --model {directory})"
        )


@torch.no_grad()
def check_documents(model: PreTrainedModel) -> None:
    """Refuse an architecture whose tokens see the document before their own.

    transformers' attention begins anew where positions do; a recurrence does not. Decided by two
    forwards: another document before it must not change a document's logits.

    Raises:
        ConfigError: naming the architecture.
    """
    training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.get_text_config().vocab_size, (1, 12), generator=generator)
    tokens = tokens.repeat(2, 1)
    tokens[1, :6] = (tokens[1, :6] + 1) % model.config.get_text_config().vocab_size
    positions = torch.arange(6).repeat(2).unsqueeze(0).to(model.device)
    sees_positions = "position_ids" in inspect.signature(model.forward).parameters
    apart = False
    if sees_positions:
        with torch.autocast(model.device.type, enabled=False):
            one, other = (
                model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 6:]
                for ids in tokens.to(model.device).split(1)
            )
        # Both have the same shapes and so the same sums: without a leak they are equal, but for
        # experts, which add other tokens' rows in another order (2e-7 in float32). An untrained
        # short convolution leaks 5e-5, its weights and gates being small.
        apart = bool((one - other).abs().max() <= 1e-5 * one.abs().max())
    model.train(training)
    if not apart:
        raise ConfigError(
            f"{type(model).__name__} lets tokens see the documents before their own in a sequence: "
            "it cannot train on conversations or with data.separate_documents"
        )


def convert_model(model: PreTrainedModel, config: SparsityConfig) -> Conversion:
    """Swap the linears as the run's sparsity section says.

    Raises:
        ConfigError, PatternError: as :func:`sparse_bitnet.nn.convert`; and if a later pattern of
            the schedule does not fit, which would otherwise stop the run when it comes.
    """
    conversion = convert(
        model, config.pattern, kind=config.kind, method=config.method, rules=config.rules
    )
    for pattern in config.until.values():
        patterns_of_modules(model, pattern)
    return conversion
