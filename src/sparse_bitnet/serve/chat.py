"""A conversation with a model on the terminal."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
import tyro
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparse_bitnet.console import say
from sparse_bitnet.core import ConfigError
from sparse_bitnet.packed.load import DType, load_with_tokenizer
from sparse_bitnet.serve.generate import Sampling, check_text, encode, encode_chat, generate_text
from sparse_bitnet.train.model import context_length

DRAWN = Sampling(temperature=0.7, top_p=0.95)
NEW = "/new"


def chat(
    model: Path,
    *,
    system: str | None = None,
    max_new_tokens: int = 512,
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = DRAWN,
    dtype: DType | None = None,
    device: str | None = None,
) -> None:
    """Talk with a packed or trained model; answers appear as they are made.

    With a chat template the model answers turn by turn. Without one it continues the text so far,
    your line at its end. Ctrl-C stops an answer, /new starts over, Ctrl-D leaves.

    Args:
        model: directory of the model and its tokenizer, or a GGUF file.
        system: instructions before the first turn; needs a chat template.
        max_new_tokens: an answer has at most so many.
        sampling: how the next token is chosen.
        dtype: to compute in; the stored one when left out.
        device: the GPU when left out, if there is one.
    """
    loaded, tokenizer = load_with_tokenizer(model, dtype=dtype, device=device)
    conversation = Conversation(loaded, tokenizer, system, max_new_tokens, sampling)
    if sys.stdin.isatty():
        import readline  # noqa: F401  # gives input() its line editing and history
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not UTF-8 can be refused
    how = "answers" if conversation.has_turns else "continues the text (it has no chat template)"
    say(f"{model} {how}; Ctrl-C stops an answer, {NEW} starts over, Ctrl-D leaves")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            say("Ctrl-D leaves")
            continue
        if line.strip() == NEW:
            conversation.start_over()
            say("a new conversation")
        elif line or not conversation.has_turns:
            try:
                conversation.answer(line, lambda text: print(text, end="", flush=True))
            except ConfigError as error:
                say(str(error))
            print()


class Conversation:
    """What was said so far, and how the model goes on; arguments as those of :func:`chat`.

    Raises:
        ConfigError: for instructions to a model without a chat template, or a length below 1.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        system: str | None = None,
        max_new_tokens: int = 512,
        sampling: Sampling = DRAWN,
    ) -> None:
        self.has_turns = tokenizer.chat_template is not None
        check_text(system or "")
        if system is not None and not self.has_turns:
            raise ConfigError(
                "chat: the tokenizer has no chat template, so there is no place for "
                "--system; the model only continues text"
            )
        if max_new_tokens < 1:
            raise ConfigError(f"chat: --max-new-tokens is {max_new_tokens}; it has to be 1 or more")
        self._model, self._tokenizer, self._sampling = model, tokenizer, sampling
        self._system, self._max_new_tokens = system, max_new_tokens
        self.start_over()

    def start_over(self) -> None:
        """Forget what was said."""
        self.messages: list[dict[str, str]] = []
        if self._system is not None:
            self.messages.append({"role": "system", "content": self._system})
        self.text = ""

    def answer(self, line: str, write: Callable[[str], None]) -> str:
        """Say a line and return the answer, whose pieces go to ``write`` as they come.

        A KeyboardInterrupt ends the answer, not the conversation: what was said of it counts. What
        no longer fits into the model's context is forgotten, oldest first.

        Raises:
            ConfigError: if the line alone does not fit, or is no text; it counts as not said.
        """
        before = list(self.messages), self.text
        try:
            tokens = self._turn(line) if self.has_turns else self._continued(line)
        except ConfigError:
            self.messages, self.text = before
            raise
        pieces: list[str] = []

        def collect(text: str) -> None:
            pieces.append(text)
            write(text)

        with suppress(KeyboardInterrupt):
            generate_text(
                self._model, self._tokenizer, tokens, self._max_new_tokens, self._sampling, collect
            )
        answer = "".join(pieces)
        if self.has_turns:
            self.messages.append({"role": "assistant", "content": answer})
        else:
            self.text += f"{answer}\n"
        return answer

    def _turn(self, line: str) -> torch.Tensor:
        """Tokens of all turns, the line as the user's; the oldest leave when there is no room."""
        check_text(line)
        self.messages.append({"role": "user", "content": line})
        oldest = 0 if self._system is None else 1
        while True:
            ids = encode_chat(self._tokenizer, self.messages)
            tokens = torch.tensor([ids], dtype=torch.long, device=self._model.device)
            if tokens.shape[1] <= self._room:
                return tokens
            if len(self.messages) <= oldest + 1:
                raise ConfigError(
                    f"chat: the line has {tokens.shape[1]} tokens with its frame and the model "
                    f"reads {self._room} at most; say it shorter"
                )
            del self.messages[oldest : oldest + 2]
            say("(the oldest turn no longer fits the model's context)")

    def _continued(self, line: str) -> torch.Tensor:
        """Tokens of the text with the line at its end, as many of the last as there is room for."""
        self.text += line
        tokens = encode(self._model, self._tokenizer, self.text)
        if tokens.shape[1] > self._room:
            say("(the beginning no longer fits the model's context)")
        return tokens[:, -int(min(self._room, tokens.shape[1])) :]

    @property
    def _room(self) -> float:
        """Tokens of a prompt: the context less an answer, half of it at least."""
        context = context_length(self._model.config)
        if context is None:
            return float("inf")
        return context - min(self._max_new_tokens, context // 2)
