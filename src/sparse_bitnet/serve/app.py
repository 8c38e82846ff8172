"""The HTTP application: OpenAI's routes over the engine.

/v1/chat/completions and /v1/completions, streaming or not, /v1/models, /health, /metrics; the chat
page is at /.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers import PreTrainedTokenizerBase

from sparse_bitnet.core import ConfigError
from sparse_bitnet.core.errors import shown
from sparse_bitnet.serve.engine import BusyError, Engine, Generation, GenerationError
from sparse_bitnet.serve.generate import encode_chat, encode_text
from sparse_bitnet.serve.grammar import Grammars
from sparse_bitnet.serve.metrics import Metrics
from sparse_bitnet.serve.middleware import error_body, error_event
from sparse_bitnet.serve.page import page
from sparse_bitnet.serve.requests import Chat, Completion, InvalidRequest, read, sampling_options
from sparse_bitnet.serve.text import TextStream, split_tool_calls

RETRY_AFTER = "1"  # seconds


def build_app(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, name: str, created: int
) -> Starlette:
    """The application of one model, which clients call ``name``."""
    server = _Server(engine, tokenizer, name, created)

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)  # meanwhile cut streams get their last event

    return Starlette(
        routes=[
            Route("/v1/chat/completions", server.chat, methods=["POST"]),
            Route("/v1/completions", server.completions, methods=["POST"]),
            Route("/v1/models", server.models),
            Route("/v1/models/{id:path}", server.model),
            Route("/health", server.health),
            Route("/", page),
            Route("/metrics", server.metrics),
        ],
        exception_handlers={
            InvalidRequest: _invalid,
            BusyError: _busy,
            GenerationError: _failed,
            Exception: _failed,
            HTTPException: _other_status,
        },
        lifespan=lifespan,
    )


class _Server:
    """The routes' functions."""

    def __init__(
        self, engine: Engine, tokenizer: PreTrainedTokenizerBase, name: str, created: int
    ) -> None:
        self._engine, self._tokenizer, self._name = engine, tokenizer, name
        self._metrics = Metrics(engine)
        self._grammars = Grammars(tokenizer, engine.vocabulary, engine.eos)
        self._card = {
            "id": name,
            "object": "model",
            "owned_by": "sparse-bitnet",
            "created": created,
        }

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card]})

    async def model(self, request: Request) -> Response:
        self._check_name(request.path_params["id"])
        return JSONResponse(self._card)

    async def health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def metrics(self, _: Request) -> Response:
        text, kind = self._metrics.text()
        return Response(text, media_type=kind)

    async def completions(self, request: Request) -> Response:
        body = read(Completion, await request.body())
        self._check_name(body.model)
        return await self._answer(request, body, [self._encode(one) for one in body.prompt])

    async def chat(self, request: Request) -> Response:
        body = read(Chat, await request.body())
        body.check_template(self._tokenizer)
        self._check_name(body.model)
        options = dict(body.chat_template_kwargs or {})
        if body.has_tools:
            options["tools"] = body.tools
        try:
            prompt = encode_chat(self._tokenizer, body.messages, **options)
        except ConfigError as error:
            raise InvalidRequest(f"messages: {error}") from None
        return await self._answer(request, body, [prompt])

    def _check_name(self, name: str | None) -> None:
        if name is not None and name != self._name:
            raise InvalidRequest(
                f"this server has the model {self._name!r}, not {shown(name)}", "model_not_found"
            )

    def _encode(self, prompt: str | list[int]) -> list[int]:
        ids = encode_text(self._tokenizer, prompt) if isinstance(prompt, str) else prompt
        if ids and max(ids) >= len(self._tokenizer):
            raise InvalidRequest(f"prompt: token id {max(ids)} is beyond the vocabulary")
        return ids

    async def _answer(
        self, request: Request, body: Completion | Chat, prompts: list[list[int]]
    ) -> Response:
        matcher = await asyncio.to_thread(self._grammars.matcher, body.response_format)
        answer = _Answer(self, body, prompts, matcher)
        self._metrics.requests.labels("chat" if answer.is_chat else "completions").inc()
        if body.stream:
            return StreamingResponse(answer.events(), media_type="text/event-stream")
        task = asyncio.create_task(answer.whole())
        gone = asyncio.create_task(_hung_up(request))
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse(await task) if task.done() else Response(status_code=499)
        finally:
            gone.cancel()
            task.cancel()
            answer.cancel()


class _Answer:
    """One request's choices, from its tokens to OpenAI's objects.

    Raises:
        InvalidRequest: if a prompt is empty or leaves no room in the context.
        BusyError: if the engine takes no more.
    """

    def __init__(
        self, server: _Server, body: Completion | Chat, prompts: list[list[int]], matcher: Any
    ) -> None:
        self._body, self.is_chat = body, isinstance(body, Chat)
        self._engine, self._tokenizer = server._engine, server._tokenizer
        self._metrics = server._metrics
        self._tools = isinstance(body, Chat) and body.has_tools
        self._head = {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if self.is_chat else "text_completion",
            "created": int(time.time()),
            "model": server._name,
        }
        context = self._engine.context
        for prompt in prompts:
            if not prompt:
                raise InvalidRequest("the prompt is empty")
            if len(prompt) >= context:
                raise InvalidRequest(
                    f"the prompt has {len(prompt)} tokens and the model's context {context}; "
                    "shorten it",
                    "context_length_exceeded",
                )
        if any(not 0 <= token < len(self._tokenizer) for token in body.logit_bias or ()):
            raise InvalidRequest("logit_bias: a token id is beyond the vocabulary")
        all_prompts = [prompt for prompt in prompts for _ in range(body.n or 1)]
        options = [
            sampling_options(body, context - len(prompt), index, matcher)
            for index, prompt in enumerate(all_prompts)
        ]
        self._prompt_tokens = sum(map(len, prompts))
        streams = bool(body.stream or body.stop)
        self._generations = self._engine.submit(all_prompts, options, streams)

    def cancel(self) -> None:
        for one in self._generations:
            self._engine.cancel(one)

    async def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        choices = []
        for index, one in enumerate(self._generations):
            parts = [part async for part in self._pieces(one)]
            text = "".join(text for text, _ in parts)
            logprobs = [entry for _, entries in parts for entry in entries]
            choices.append(self._choice(index, one, text, logprobs))
        return self._head | {"choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events, the pieces of all choices as they come."""
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        tasks = [
            asyncio.create_task(self._stream(index, one, queue))
            for index, one in enumerate(self._generations)
        ]
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        head = self._head | {"object": kind}
        try:
            running = len(tasks)
            while running:
                choice = await queue.get()
                if choice is None:
                    running -= 1
                elif "error" in choice:
                    yield error_event(choice["error"])
                    return
                else:
                    yield _event(head | {"choices": [choice]})
            if self._body.stream_options and self._body.stream_options.include_usage:
                yield _event(head | {"choices": [], "usage": self._usage()})
            yield b"data: [DONE]\n\n"
        finally:
            self.cancel()
            for task in tasks:
                task.cancel()

    async def _stream(self, index: int, one: Generation, queue: asyncio.Queue[Any]) -> None:
        """Put a choice's chunks into the queue, then None."""

        def chunk(delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> None:
            body = {"delta": delta} if self.is_chat else {"text": delta.get("content", "")}
            tail = {"logprobs": logprobs, "finish_reason": reason}
            queue.put_nowait({"index": index, **body, **tail})

        try:
            if self.is_chat:
                chunk({"role": "assistant", "content": ""})
            whole, held = "", []
            async for text, entries in self._pieces(one):
                if self._tools:
                    whole += text
                    held += entries
                elif text or entries:
                    chunk({"content": text}, self._logprobs(entries))
            reason = one.finish_reason or "stop"
            if self._tools:  # a call is known when it is whole
                text, calls = split_tool_calls(whole)
                delta: dict[str, Any] = {"content": text} if text else {}
                if calls:
                    called = enumerate(_tool_calls(calls))
                    delta["tool_calls"] = [{"index": place, **call} for place, call in called]
                    reason = "tool_calls"
                chunk(delta, self._logprobs(held))
            chunk({}, None, reason)
        except GenerationError as error:
            queue.put_nowait({"error": str(error)})
        queue.put_nowait(None)

    async def _pieces(self, one: Generation) -> AsyncIterator[tuple[str, list[Any]]]:
        """Text and the log-probabilities of its tokens, until the end or a stop string."""
        stream = TextStream(self._tokenizer, self._body.stop or [])
        if isinstance(self._body, Completion) and self._body.echo:
            yield str(self._tokenizer.decode(one.prompt, skip_special_tokens=True)), []
        counted = 0
        async for tokens in one:
            self._metrics.tokens(one.times[counted : counted + len(tokens) + 1], counted == 0)
            counted += len(tokens)
            text = stream.add([token.id for token in tokens])
            yield text, [token for token in tokens if token.logprob is not None]
            if stream.has_stopped:
                one.finish_reason = "stop"
                break
        self._engine.cancel(one)
        yield stream.end(), []

    def _choice(self, index: int, one: Generation, text: str, entries: list[Any]) -> dict[str, Any]:
        tail = {"logprobs": self._logprobs(entries), "finish_reason": one.finish_reason or "stop"}
        if not self.is_chat:
            return {"index": index, "text": text, **tail}
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if self._tools:
            message["content"], calls = split_tool_calls(text)
            if calls:
                message["tool_calls"] = _tool_calls(calls)
                tail["finish_reason"] = "tool_calls"
        return {"index": index, "message": message, **tail}

    def _logprobs(self, entries: list[Any]) -> dict[str, Any] | None:
        if not entries:
            return None
        if not self.is_chat:
            return {
                "tokens": [self._word(entry.id) for entry in entries],
                "token_logprobs": [entry.logprob for entry in entries],
                "top_logprobs": [
                    {self._word(id): value for id, value in entry.top} for entry in entries
                ],
                "text_offset": None,
            }

        def said(id: int, value: float) -> dict[str, Any]:
            word = self._word(id)
            # Of a part of a character they are not known.
            known = None if "�" in word else list(word.encode())
            return {"token": word, "logprob": value, "bytes": known}

        return {
            "content": [
                said(entry.id, entry.logprob)
                | {"top_logprobs": [said(id, value) for id, value in entry.top]}
                for entry in entries
            ]
        }

    def _word(self, id: int) -> str:
        return str(self._tokenizer.decode([id]))

    def _usage(self) -> dict[str, int]:
        answered = sum(len(one.ids) for one in self._generations)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": answered,
            "total_tokens": self._prompt_tokens + answered,
        }


def _tool_calls(calls: list[dict[str, str]]) -> list[dict[str, Any]]:
    return [
        {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": call}
        for call in calls
    ]


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _invalid(_: Request, error: Any) -> Response:
    return JSONResponse(error_body(str(error), error.code), HTTPStatus.BAD_REQUEST)


async def _busy(_: Request, error: Exception) -> Response:
    body = error_body(str(error), "rate_limit_exceeded", "server_error")
    headers = {"Retry-After": RETRY_AFTER}
    return JSONResponse(body, HTTPStatus.TOO_MANY_REQUESTS, headers)


async def _failed(_: Request, error: Exception) -> Response:
    message = str(error)[:500]
    if not isinstance(error, GenerationError):
        message = f"{type(error).__name__}: {message}"
    return JSONResponse(error_body(message, kind="server_error"), HTTPStatus.INTERNAL_SERVER_ERROR)


async def _other_status(request: Request, error: Any) -> Response:
    message = f"{error.detail}: {request.method} {shown(request.url.path)}"
    return JSONResponse(error_body(message), error.status_code)
