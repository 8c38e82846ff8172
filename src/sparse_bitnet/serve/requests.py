"""Checks of what clients of the HTTP server ask for, before anything is computed.

transformers' handlers convert fields as they come to them, so a wrong one ends in status 500 and
some are ignored in silence. Here each field is checked by name; what the server cannot do is
refused rather than left out of the answer.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from sparse_bitnet.core import SparseBitNetError
from sparse_bitnet.serve.generate import COLDEST

ROLES = {"system", "developer", "user", "assistant", "tool"}
MOST_STOPS, LONGEST_STOP = 16, 128  # characters: transformers prepares each of them for seconds


class InvalidRequest(SparseBitNetError):
    """A request that makes no sense; answered with status 400. ``code`` is OpenAI's, if any."""

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


def check_chat(body: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a /v1/chat/completions request that cannot be served.

    Raises:
        InvalidRequest: naming the field, its value and what it should be.
    """
    _check_fields(body)
    if tokenizer.chat_template is None:
        raise InvalidRequest(
            "this model has no chat template, so it continues text and cannot chat; use "
            "/v1/completions"
        )
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages", messages, "a list of messages, one at least")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise _wrong(where, message, "an object with role and content")
        if message.get("role") not in ROLES:
            raise _wrong(f"{where}.role", message.get("role"), f"among {sorted(ROLES)}")
        _check_content(f"{where}.content", message)
    # Whoever could name these could run a template of their own.
    own = inspect.signature(tokenizer.apply_chat_template).parameters
    for name in (body.get("chat_template_kwargs") or {}).keys() & own.keys():
        raise InvalidRequest(f"chat_template_kwargs.{name} is not for requests to set")


def check_completion(body: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a /v1/completions request that cannot be served.

    Raises:
        InvalidRequest: naming the field, its value and what it should be.
    """
    _check_fields(body)
    if not _is_text(body.get("prompt")):
        raise _wrong("prompt", body.get("prompt"), "a string of whole characters")


def _check_content(where: str, message: dict[str, Any]) -> None:
    content = message.get("content")
    if _is_text(content) or (content is None and message["role"] == "assistant"):
        return
    parts = content if isinstance(content, list) else [None]
    for part in parts:
        kind, text = (
            (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
        )
        if kind != "text" or not _is_text(text):
            raise _wrong(where, content, "text: a string, or parts of type text")


def _is_text(value: Any) -> bool:
    """A string, and not half of a surrogate pair, which JSON can spell and no tokenizer reads."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, int | float) and type(v) is not bool and low <= v <= high


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda v: type(v) is int and low <= v <= high


def _is_stop(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return 0 < len(values) <= MOST_STOPS and all(
        _is_text(v) and 0 < len(v) <= LONGEST_STOP for v in values
    )


def _is_temperature(value: Any) -> bool:
    return _number(0, 2)(value) and (value == 0 or value >= COLDEST)


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


# Field: (what it should be, the check). None always stands for "left out".
FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "model": ("a string of whole characters", _is_text),
    "stream": ("true or false", lambda v: isinstance(v, bool)),
    "temperature": (f"0, or a number from {COLDEST} to 2", _is_temperature),
    "top_p": ("a number above 0, up to 1", _number(1e-9, 1)),
    "max_tokens": ("a whole number, 1 or more", _whole(1, 2**31)),
    "max_completion_tokens": ("a whole number, 1 or more", _whole(1, 2**31)),
    "seed": ("a whole number, 0 or more", _whole(0, 2**63 - 1)),
    "frequency_penalty": ("a number from 0 to 2", _number(0, 2)),
    "stop": (f"1 to {LONGEST_STOP} characters, or up to {MOST_STOPS} such strings", _is_stop),
    "suffix": ("a string of whole characters", _is_text),
    "tools": ("a list of objects", _are_objects),
    "chat_template_kwargs": ("an object", lambda v: isinstance(v, dict)),
    # What this server does not do: only the value that asks for nothing.
    "n": ("1, which is what this server gives", _whole(1, 1)),
    "best_of": ("1, which is what this server gives", _whole(1, 1)),
    "echo": ("false; this server cannot do more", lambda v: v is False),
    "logprobs": ("false; this server cannot do more", lambda v: v is False),
    "top_logprobs": ("0; this server cannot do more", _whole(0, 0)),
    "presence_penalty": ("0; use frequency_penalty", _number(0, 0)),
    "response_format": ("text; this server cannot do more", lambda v: v == {"type": "text"}),
    "logit_bias": ("left out; this server cannot do it", lambda v: v == {}),
    "generation_config": ("left out; this server has no such field", lambda v: False),
}


def _check_fields(body: dict[str, Any]) -> None:
    for name, (expected, fits) in FIELDS.items():
        value = body.get(name)
        if value is not None and not fits(value):
            raise _wrong(name, value, expected)
    try:
        whole = _is_text(json.dumps(body, ensure_ascii=False))  # names and tools have text too
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    if not whole:
        raise InvalidRequest("a string of the body holds half a character (a lone surrogate)")


def _wrong(field: str, value: object, expected: str) -> InvalidRequest:
    return InvalidRequest(f"{field} is {str(value)[:100]!a}; it has to be {expected}")
