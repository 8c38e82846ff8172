"""Text generation from a model directory, streamed token by token."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from sparse_bitnet.core import ConfigError, SparseBitNetError
from sparse_bitnet.nn import frozen
from sparse_bitnet.packed.load import DType, load_with_tokenizer
from sparse_bitnet.train.model import context_length

COLDEST = 1e-30
"""Scores divided by a lower temperature than this could leave float32."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    # 0 takes the likeliest token; above, tokens are drawn, the flatter the higher
    temperature: float = 0.0
    top_k: int = 0  # draw among this many likeliest tokens; 0 for all
    top_p: float = 1.0  # draw among the likeliest tokens that together have this probability
    repetition_penalty: float = 1.0  # divide the score of tokens that occurred already; 1 for none
    seed: int = 0  # of the draws

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("temperature", self.temperature >= 0, "0 or more"),
            (
                "temperature",
                not 0 < self.temperature < COLDEST and self.temperature < math.inf,
                f"finite, and 0 or at least {COLDEST}",
            ),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("seed", -(2**63) <= self.seed < 2**64, "a whole number of 64 bits"),
        ):
            if not fits:
                option = f"--{name.replace('_', '-')} is {getattr(self, name)}"
                raise ConfigError(f"generate: {option}; it has to be {expected}")

    def options(self) -> dict[str, float | int | bool | None]:
        """For transformers' ``generate``. All are set, so that no stored default slips in."""
        draws = self.temperature > 0
        return {
            "do_sample": draws,
            "temperature": self.temperature if draws else None,
            "top_k": self.top_k if draws else None,
            "top_p": self.top_p if draws else None,
            "repetition_penalty": self.repetition_penalty,
            "num_beams": 1,
        }


GREEDY = Sampling()


def generate(
    directory: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 200,
    sampling: Sampling | None = None,
    dtype: DType | None = None,
    device: str | torch.device | None = None,
    write: Callable[[str], None] | None = None,
) -> str:
    """Continue a prompt with the model of a packed or trained directory.

    Args:
        directory: of the model and its tokenizer, or a GGUF file.
        prompt: the text to continue.
        max_new_tokens: stop after so many, if the model does not stop before.
        sampling: greedy when left out.
        dtype: to compute in; the stored one when left out.
        device: the GPU when left out, if there is one.
        write: called with each piece of text as soon as it is complete.

    Returns:
        The new text, without the prompt.

    Raises:
        PackedFormatError, CheckpointError: if the directory cannot be loaded.
        ConfigError: if it has no tokenizer, or the prompt does not fit the model.
    """
    model, tokenizer = load_with_tokenizer(directory, dtype=dtype, device=device)
    return generate_text(model, tokenizer, prompt, max_new_tokens, sampling, write)


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | torch.Tensor,
    max_new_tokens: int = 200,
    sampling: Sampling | None = None,
    write: Callable[[str], None] | None = None,
) -> str:
    """:func:`generate` with a loaded model, from a text or from tokens ``[1, length]``.

    Raises:
        ConfigError: if the prompt is empty and there is no token to begin with, or leaves no room
            in the model's context; if ``max_new_tokens`` is below 1, or the model's generation
            config makes no sense.
    """
    tokens = encode(model, tokenizer, prompt) if isinstance(prompt, str) else prompt
    sampling = sampling or GREEDY
    if max_new_tokens < 1:
        raise ConfigError(f"generate: --max-new-tokens is {max_new_tokens}; it has to be 1 or more")
    room = context_length(model.config)
    if room is not None:
        if tokens.shape[1] >= room:
            raise ConfigError(
                f"generate: the prompt has {tokens.shape[1]} tokens and the model's context "
                f"{room}; shorten the prompt"
            )
        max_new_tokens = min(max_new_tokens, room - tokens.shape[1])
    streamer = None if write is None else _Writer(tokenizer, write)
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = tokenizer.eos_token_id
    cuda = [model.device] if model.device.type == "cuda" else []
    with frozen(model), torch.random.fork_rng(devices=cuda):
        torch.manual_seed(sampling.seed)
        try:
            result = model.generate(  # type: ignore[operator]  # the mixin is not typed
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=max_new_tokens,
                pad_token_id=pad,
                streamer=streamer,
                **sampling.options(),
            )
        except SparseBitNetError:
            raise
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise ConfigError(
                f"generate: transformers refuses ({str(error)[:300]}); the model's "
                "generation_config.json asks for what it cannot do"
            ) from error
    text = tokenizer.decode(result[0, tokens.shape[1] :], skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def generate_command(
    model: Path,
    prompt: str,
    *,
    max_new_tokens: int = 200,
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = GREEDY,
    dtype: DType | None = None,
    device: str | None = None,
    compile: bool = False,
) -> None:
    """Print a prompt and its continuation, streaming the text to the terminal.

    Args:
        model: directory of the model and its tokenizer, or a GGUF file.
        prompt: the text to continue.
        max_new_tokens: stop after so many.
        sampling: how the next token is chosen.
        dtype: to compute in; the stored one when left out.
        device: the GPU when left out, if there is one.
        compile: on a GPU, compile the decoder first: fewer kernels a token, for long texts.
    """
    loaded, tokenizer = load_with_tokenizer(model, dtype=dtype, device=device, compile=compile)
    before = prompt  # shown with the first piece, when nothing is left to be refused

    def write(text: str) -> None:
        nonlocal before
        print(before + text, end="", flush=True)
        before = ""

    generate_text(loaded, tokenizer, prompt, max_new_tokens, sampling, write)
    print()


def encode(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> torch.Tensor:
    """:func:`encode_text` as a tensor ``[1, length]`` on the model's device.

    Raises:
        ConfigError: as :func:`encode_text`; if there is no token to begin with.
    """
    ids = encode_text(tokenizer, prompt)
    if not ids:
        raise ConfigError("generate: the prompt is empty and the tokenizer has no first token")
    return torch.tensor([ids], dtype=torch.long, device=model.device)


def encode_text(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The prompt's token ids; for an empty one the token that texts begin with, if there is one.

    Raises:
        ConfigError: as :func:`check_text`.
    """
    check_text(prompt)
    ids = list(tokenizer(prompt).input_ids)
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return ids if ids or first is None else [first]


def _as_read(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Messages whose content is text, or a list of parts where the template reads nothing else.

    A template that reads text writes a list as Python does, and one that reads parts leaves text
    out: both in silence, so that one of them is tried first.
    """
    reads_text, sign = True, "sign"
    with suppress(Exception):  # a template that refuses a message alone
        probe: Any = tokenizer.apply_chat_template(
            [{"role": "user", "content": sign}], tokenize=False
        )
        reads_text = sign in probe
    read = []
    for message in messages:
        content = message.get("content")
        if reads_text and isinstance(content, list):
            content = "\n".join(part["text"] for part in content)
        elif not reads_text and isinstance(content, str):
            content = [{"type": "text", "text": content}]
        read.append(dict(message) | ({"content": content} if "content" in message else {}))
    return read


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], **options: Any
) -> list[int]:
    """Token ids of a conversation by the tokenizer's chat template, up to where an answer begins.

    Args:
        messages: each with role and content, which is text or a list of parts with texts.
        options: for the template, such as ``tools``.

    Raises:
        ConfigError: if the template refuses the messages, or fails: it is a program of the
            model's own.
    """
    try:
        encoded: Any = tokenizer.apply_chat_template(
            _as_read(tokenizer, messages),
            add_generation_prompt=True,
            return_dict=True,
            **options,
        )
        return list(encoded["input_ids"])
    except Exception as error:  # jinja's own, and whatever an expression raises
        raise ConfigError(f"the chat template says: {str(error)[:300]}") from error


def check_text(text: str) -> None:
    """Refuse halves of characters, which tokenizers do not take.

    Raises:
        ConfigError: naming the place. Python reads arguments so that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"generate: the text is not UTF-8 at character {error.start}; write it in UTF-8"
        ) from None


class _Writer(TextStreamer):
    """Streamer that passes text on as soon as it is final."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(text)
