"""Incremental detokenization of an answer, up to a stop string."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

TOOL_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
"""How Qwen, Hermes and others write calls; their templates say so to the model."""


class TextStream:
    """Text of a growing list of tokens.

    Bytes of a character that is not whole yet are held back, and so is what may be the beginning
    of a stop string.

    Attributes:
        has_stopped: True once a stop string was found; the text ends before it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._ids: list[int] = []
        self._begin = self._read = 0  # tokens from begin to read have been turned into text
        self._held = ""
        self.has_stopped = False

    def add(self, tokens: list[int]) -> str:
        """The text that is certain now and was not before."""
        self._ids += tokens
        return self._release(self._new_text(final=False), final=False)

    def end(self) -> str:
        """The text held back so far."""
        return "" if self.has_stopped else self._release(self._new_text(final=True), final=True)

    def _new_text(self, final: bool) -> str:
        before = self._decode(self._ids[self._begin : self._read])
        text = self._decode(self._ids[self._begin :])
        if not final and text.endswith("�"):
            return ""
        # Decoded together with the tokens before, as some tokenizers drop a first space.
        self._begin, self._read = self._read, len(self._ids)
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _release(self, text: str, final: bool) -> str:
        text = self._held + text
        places = [place for place in map(text.find, self._stops) if place >= 0]
        if places:
            self.has_stopped, self._held = True, ""
            return text[: min(places)]
        keep = 0
        if not final:
            for stop in self._stops:
                for length in range(min(len(stop) - 1, len(text)), keep, -1):
                    if text.endswith(stop[:length]):
                        keep = length
                        break
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def split_tool_calls(text: str) -> tuple[str, list[dict[str, str]]]:
    """An answer without its tool calls, and name and arguments (JSON) of each of them."""
    calls = []
    for match in TOOL_CALL.finditer(text):
        try:
            call: Any = json.loads(match[1])
            calls.append({"name": str(call["name"]), "arguments": json.dumps(call["arguments"])})
        except (ValueError, KeyError, TypeError, RecursionError):
            return text, []  # the model wrote something else: it stays text
    return TOOL_CALL.sub("", text).strip() if calls else text, calls
