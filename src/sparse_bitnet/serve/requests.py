"""Bodies of HTTP requests: one dataclass a route, whose fields pydantic checks.

What the server cannot do is refused rather than left out of the answer. None means left out.
"""

from __future__ import annotations

import inspect
import json
import secrets
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Required, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    with_config,
)
from transformers import PreTrainedTokenizerBase
from typing_extensions import TypedDict

from sparse_bitnet.core import ConfigError, SparseBitNetError
from sparse_bitnet.core.errors import shown
from sparse_bitnet.serve.generate import COLDEST, encode_chat
from sparse_bitnet.serve.sampling import SamplingOptions
from sparse_bitnet.train.recipe import checked

MOST_CHOICES, MOST_PROMPTS = 16, 64
PROMPT = f"text, a list of token ids, or a list of up to {MOST_PROMPTS} of either"
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
OPEN = ConfigDict(extra="allow", strict=True)
T = TypeVar("T")


class InvalidRequest(SparseBitNetError):
    """A request that makes no sense; answered with status 400. ``code`` is OpenAI's, if any."""

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


def _temperature(value: float) -> float:
    if 0 < value < COLDEST:
        raise ValueError(f"{value} is neither 0 nor a number from {COLDEST} to 2")
    return value


def _prompts(value: Any) -> Any:
    """A list of prompts, each text or token ids."""

    def is_one(prompt: Any) -> bool:
        are_ids = isinstance(prompt, list) and all(
            type(one) is int and 0 <= one <= 2**31 for one in prompt
        )
        return isinstance(prompt, str) or (are_ids and bool(prompt))

    prompts = [value] if is_one(value) else value
    sound = isinstance(prompts, list) and all(map(is_one, prompts))
    if not sound or not 0 < len(prompts) <= MOST_PROMPTS or len(set(map(type, prompts))) > 1:
        raise ValueError(f"it has to be {PROMPT}, not {shown(value)}")
    return prompts


def _has_content(message: Any) -> Any:
    if message.get("content") is None and message["role"] != "assistant":
        raise ValueError("its content is missing")
    return message


def _stops(value: Any) -> Any:
    if not isinstance(value, str | list):
        raise ValueError(f"it has to be text or a list of texts, not {shown(value)}")
    return [value] if isinstance(value, str) else value


def _text_or_parts(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    if not isinstance(value, str | list):
        raise ValueError(f"it has to be text or a list of parts, not {shown(value)}")
    return value if isinstance(value, str) else check(value)


def _parsed(arguments: Any) -> Any:
    """Of a call: OpenAI writes them as JSON in text, and chat templates expect its values."""
    with suppress(TypeError, ValueError, RecursionError):
        values = json.loads(arguments or "{}")
        return values if isinstance(values, dict) else arguments
    return arguments


Count = Annotated[int, Field(ge=1, le=2**31)]
Stop = Annotated[str, Field(min_length=1, max_length=128)]
Stops = Annotated[list[Stop], Field(max_length=16), BeforeValidator(_stops)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


@with_config(STRICT)
@dataclass(frozen=True)
class Schema:
    """A JSON schema, as OpenAI wraps it."""

    schema: dict[str, Any]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


@with_config(STRICT)
@dataclass(frozen=True)
class Form:
    """What an answer has to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    def __post_init__(self) -> None:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError(
                "json_schema: {schema: …} belongs to type json_schema, and to no other"
            )


@with_config(STRICT)
@dataclass(frozen=True)
class StreamOptions:
    """What a stream has beside its text."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Part(TypedDict):
    """A piece of a message; images and the like are refused."""

    type: Literal["text"]
    text: str


@with_config(OPEN)
class Function(TypedDict, total=False):
    """What a tool call calls."""

    arguments: Annotated[Any, AfterValidator(_parsed)]


@with_config(OPEN)
class ToolCall(TypedDict, total=False):
    """A call that an earlier answer made."""

    function: Function


@with_config(OPEN)
class Message(TypedDict, total=False):
    """A turn of a conversation, with whatever else the chat template knows of it."""

    role: Required[Literal["system", "developer", "user", "assistant", "tool"]]
    content: Annotated[list[Part], WrapValidator(_text_or_parts)] | None
    tool_calls: list[ToolCall] | None


@with_config(STRICT)
@dataclass(frozen=True, kw_only=True)
class Body:
    """What both routes take."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2), AfterValidator(_temperature)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Count | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stop: Stops | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    user: str | None = None
    response_format: Form | None = None


@dataclass(frozen=True, kw_only=True)
class Completion(Body):
    """/v1/completions; ``prompt`` is a list of prompts, each text or token ids."""

    prompt: Annotated[Any, AfterValidator(_prompts)]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    def __post_init__(self) -> None:
        if self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs: this server computes none for the prompt")


@dataclass(frozen=True, kw_only=True)
class Chat(Body):
    """/v1/chat/completions."""

    messages: Annotated[list[Annotated[Message, AfterValidator(_has_content)]], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    store: Literal[False] | None = None

    def __post_init__(self) -> None:
        if self.tools and self.response_format and self.response_format.type != "text":
            raise ValueError("response_format: beside tools an answer cannot be kept to JSON")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs has to be left out, or beside logprobs true")

    @property
    def has_tools(self) -> bool:
        """True if the answer may be tool calls."""
        return bool(self.tools) and self.tool_choice != "none"

    def check_template(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse what the model's chat template cannot do, or a request must not.

        Raises:
            InvalidRequest: naming it.
        """
        if tokenizer.chat_template is None:
            raise InvalidRequest(
                "this model has no chat template, so it continues text and cannot chat; use "
                "/v1/completions"
            )
        template = str(tokenizer.chat_template)
        if self.tools and not ("tools" in template and "<tool_call>" in template):
            raise InvalidRequest("tools: this model's chat template defines no form of tool calls")
        # Whoever could name these could run a template of their own.
        ours = inspect.signature(encode_chat).parameters
        own = ours | inspect.signature(tokenizer.apply_chat_template).parameters
        for name in (self.chat_template_kwargs or {}).keys() & own.keys():
            raise InvalidRequest(f"chat_template_kwargs.{name} is not for requests to set")


def read(kind: type[T], body: bytes) -> T:
    """A request's body.

    Raises:
        InvalidRequest: for what is no JSON, and for fields that are unknown or make no sense.
    """
    try:
        return checked(kind, body, "")
    except ConfigError as error:
        raise InvalidRequest(str(error)) from None


def sampling_options(
    body: Completion | Chat, room: int, choice: int, matcher: Any = None
) -> SamplingOptions:
    """For one of a body's choices; ``room`` bounds the tokens of an answer.

    Without a seed each request draws from another.
    """
    if isinstance(body, Chat):
        most = body.max_completion_tokens or body.max_tokens or room
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
    else:
        most, logprobs = body.max_tokens or room, body.logprobs
    seed = secrets.randbits(62) if body.seed is None else body.seed
    return SamplingOptions(
        max_tokens=min(most, room),
        temperature=body.temperature or 0.0,
        top_p=body.top_p or 1.0,
        seed=(seed + choice) % 2**63,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=body.logit_bias or {},
        logprobs=logprobs,
        matcher=matcher,
    )
