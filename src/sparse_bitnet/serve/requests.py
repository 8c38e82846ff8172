"""Validation of HTTP request bodies.

Each field is checked by name; what the server cannot do is refused rather than left out of the
answer.
"""

from __future__ import annotations

import inspect
import json
import secrets
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from sparse_bitnet.core import SparseBitNetError
from sparse_bitnet.core.errors import shown
from sparse_bitnet.serve.generate import COLDEST
from sparse_bitnet.serve.sampling import SamplingOptions

ROLES = {"system", "developer", "user", "assistant", "tool"}
MOST_STOPS, LONGEST_STOP = 16, 128  # characters
MOST_CHOICES, MOST_PROMPTS = 16, 64
FORMATS = "{type: text}, {type: json_object} or {type: json_schema, json_schema: {schema: …}}"
PROMPT = f"text, a list of token ids, or a list of up to {MOST_PROMPTS} of either"


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
    _check_fields(body, COMMON | CHAT)
    if tokenizer.chat_template is None:
        raise InvalidRequest(
            "this model has no chat template, so it continues text and cannot chat; use "
            "/v1/completions"
        )
    template = str(tokenizer.chat_template)
    if body.get("tools") and not ("tools" in template and "<tool_call>" in template):
        raise InvalidRequest("tools: this model's chat template defines no form of tool calls")
    if body.get("tools") and (body.get("response_format") or {}).get("type", "text") != "text":
        raise InvalidRequest("response_format: beside tools an answer cannot be kept to JSON")
    if body.get("top_logprobs") and not body.get("logprobs"):
        raise _wrong("top_logprobs", body["top_logprobs"], "left out, or beside logprobs true")
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


def check_completion(body: dict[str, Any]) -> None:
    """Refuse a /v1/completions request that cannot be served.

    Raises:
        InvalidRequest: naming the field, its value and what it should be.
    """
    _check_fields(body, COMMON | COMPLETION)
    if body.get("prompt") is None:
        raise _wrong("prompt", None, PROMPT)
    if body.get("echo") and body.get("logprobs") is not None:
        raise InvalidRequest("echo with logprobs: this server computes none for the prompt")


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


def _is_bias(value: Any) -> bool:
    return isinstance(value, dict) and all(
        key.isascii() and key.isdigit() and len(key) < 10 and _number(-100, 100)(bias)
        for key, bias in value.items()
    )


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_whole(0, 2**31)(v) for v in value)


def _is_prompt(value: Any) -> bool:
    if _is_text(value) or _are_ids(value):
        return True
    return (
        isinstance(value, list)
        and 0 < len(value) <= MOST_PROMPTS
        and (all(map(_is_text, value)) or all(map(_are_ids, value)))
    )


def _is_format(value: Any) -> bool:
    if value in ({"type": "text"}, {"type": "json_object"}):
        return True
    if not isinstance(value, dict) or value.keys() != {"type", "json_schema"}:
        return False
    named = value["json_schema"]
    return (
        value["type"] == "json_schema"
        and isinstance(named, dict)
        and isinstance(named.get("schema"), dict)
        and named.keys() <= {"name", "description", "schema", "strict"}
    )


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


Fields = dict[str, tuple[str, Callable[[Any], bool]]]

# Field: (what it should be, the check). None always stands for "left out".
COMMON: Fields = {
    "model": ("a string of whole characters", _is_text),
    "stream": ("true or false", _is_flag),
    "stream_options": ("an object", lambda v: isinstance(v, dict)),
    "temperature": (f"0, or a number from {COLDEST} to 2", _is_temperature),
    "top_p": ("a number above 0, up to 1", _number(1e-9, 1)),
    "max_tokens": ("a whole number, 1 or more", _whole(1, 2**31)),
    "seed": ("a whole number, 0 or more", _whole(0, 2**63 - 1)),
    "frequency_penalty": ("a number from -2 to 2", _number(-2, 2)),
    "presence_penalty": ("a number from -2 to 2", _number(-2, 2)),
    "logit_bias": ("an object of token ids and numbers from -100 to 100", _is_bias),
    "stop": (f"1 to {LONGEST_STOP} characters, or up to {MOST_STOPS} such strings", _is_stop),
    "n": (f"a whole number from 1 to {MOST_CHOICES}", _whole(1, MOST_CHOICES)),
    "user": ("a string", _is_text),
    "response_format": (FORMATS, _is_format),
}
COMPLETION: Fields = {
    "prompt": (PROMPT, _is_prompt),
    "echo": ("true or false", _is_flag),
    "logprobs": ("a whole number from 0 to 5", _whole(0, 5)),
    "best_of": ("1, which is what this server gives", _whole(1, 1)),
    "suffix": ("left out; this server cannot do it", lambda v: v == ""),
}
CHAT: Fields = {
    "messages": ("a list of messages, one at least", lambda v: isinstance(v, list)),
    "max_completion_tokens": ("a whole number, 1 or more", _whole(1, 2**31)),
    "logprobs": ("true or false", _is_flag),
    "top_logprobs": ("a whole number from 0 to 20", _whole(0, 20)),
    "tools": ("a list of objects", _are_objects),
    "tool_choice": ("auto or none; this server cannot do more", lambda v: v in ("auto", "none")),
    "parallel_tool_calls": ("true; this server cannot do less", lambda v: v is True),
    "chat_template_kwargs": ("an object", lambda v: isinstance(v, dict)),
    "metadata": ("an object", lambda v: isinstance(v, dict)),
    "store": ("false; this server stores nothing", lambda v: v is False),
}


def _check_fields(body: dict[str, Any], fields: Fields) -> None:
    try:
        whole = _is_text(json.dumps(body, ensure_ascii=False))  # names and tools have text too
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    if not whole:
        raise InvalidRequest("a string of the body holds half a character (a lone surrogate)")
    for name in body.keys() - fields.keys():
        raise InvalidRequest(f"{shown(name)} is no field that this server knows")
    for name, (expected, fits) in fields.items():
        value = body.get(name)
        if value is not None and not fits(value):
            raise _wrong(name, value, expected)


def sampling_options(
    body: dict[str, Any], room: int, choice: int, matcher: Any = None
) -> SamplingOptions:
    """A checked body's options for one of its choices; ``room`` bounds the tokens of an answer.

    Without a seed each request draws from another.
    """
    logprobs = body.get("logprobs")
    if isinstance(logprobs, bool):
        logprobs = body.get("top_logprobs") or 0 if logprobs else None
    seed = body.get("seed")
    seed = secrets.randbits(62) if seed is None else seed
    most = body.get("max_completion_tokens") or body.get("max_tokens") or room
    return SamplingOptions(
        max_tokens=min(most, room),
        temperature=body.get("temperature") or 0.0,
        top_p=body.get("top_p") or 1.0,
        seed=(seed + choice) % 2**63,
        presence_penalty=body.get("presence_penalty") or 0.0,
        frequency_penalty=body.get("frequency_penalty") or 0.0,
        logit_bias={int(key): bias for key, bias in (body.get("logit_bias") or {}).items()},
        logprobs=logprobs,
        matcher=matcher,
    )


def _wrong(field: str, value: object, expected: str) -> InvalidRequest:
    return InvalidRequest(f"{field} is {str(value)[:100]!a}; it has to be {expected}")
