"""An OpenAI-compatible HTTP server: transformers' own, with this package's models and checks.

transformers brings the routes, the streaming and the queue of generations (``transformers serve``).
What is added here is what it does not do:

- models come from :func:`load`, so packed and trained directories compute what training computed,
  and the tokenizer is the one they were trained with;
- a prompt that leaves no room in the context, or a field that makes no sense, is answered with
  status 400 and a reason instead of 500 or of nonsense;
- every error has OpenAI's form, which clients show to their users;
- a seed gives the same text beside other requests as alone, and an answer that nobody waits for any
  more is not computed to its end, streamed or not;
- clients reach the routes of text generation and no others: transformers' server also lets them
  load any model by name and unload this one;
- door.py keeps out what no application should see: long bodies, slow requests, foreign host names.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import threading
from collections.abc import Callable
from contextvars import ContextVar
from http import HTTPStatus
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cli.serve import Serve
from transformers.cli.serving.utils import GenerateManager
from transformers.utils.import_utils import is_serve_available

from sparse_bitnet.console import say
from sparse_bitnet.core import ConfigError, MissingExtraError
from sparse_bitnet.core.errors import shown
from sparse_bitnet.deploy.packed.pretrained import DType, load_with_tokenizer
from sparse_bitnet.serve import door
from sparse_bitnet.serve.generate import context_length
from sparse_bitnet.serve.ready import make_ready
from sparse_bitnet.serve.requests import InvalidRequest, check_chat, check_completion

ROUTES = {"/health", "/v1/models", "/v1/chat/completions", "/v1/completions"}
BYTES, BYTES_PER_TOKEN = 1 << 20, 64  # a request has at most so many, by the model's context
SECONDS_TO_FINISH = 5  # for streams under way when the server is stopped
CHAT_ML = "<|im_start|>"

_seed: ContextVar[int | None] = ContextVar("seed", default=None)
_hung_up: ContextVar[threading.Event | None] = ContextVar("hung_up", default=None)


def serve(
    directory: Path,
    *,
    host: str = "localhost",
    port: int = 8000,
    name: str | None = None,
    api_key: Path | None = None,
    allowed_hosts: tuple[str, ...] = (),
    dtype: DType | None = None,
    device: str | None = None,
) -> None:
    """Serve a packed or trained model to OpenAI clients, until Ctrl-C.

    Routes: /v1/chat/completions and /v1/completions, streaming or not, /v1/models, /health. One
    request is computed at a time, the others wait. Without an API key anyone who reaches the port
    may use it.

    Args:
        directory: of the model and its tokenizer.
        host: address to listen on; 0.0.0.0 for every network of this machine.
        port: to listen on.
        name: what clients call the model; the directory's name when left out.
        api_key: file with the key that clients must send; SPARSE_BITNET_API_KEY when left out.
        allowed_hosts: names of this server beside localhost and host that clients may use: a name,
            *.NAME, or * for any.
        dtype: to compute in; the stored one when left out.
        device: the GPU when left out, if there is one.

    Raises:
        MissingExtraError: without the extra ``serve``.
        ConfigError: for a port out of range or taken, or a directory without tokenizer.
        PackedFormatError, CheckpointError: if the directory cannot be loaded.
    """
    server = build_server(
        directory,
        host=host,
        port=port,
        name=name,
        api_key=api_key,
        allowed_hosts=allowed_hosts,
        dtype=dtype,
        device=device,
    )
    chat = "" if server.has_chat_template else " (no chat template: /v1/completions only)"
    say(f"serving {server.name} at http://{host}:{port}/v1{chat}; Ctrl-C stops")
    server.uvicorn.run()


class Server:
    """What :func:`build_server` made: ``uvicorn`` runs it, ``name`` is the model's."""

    def __init__(self, uvicorn: Any, name: str, has_chat_template: bool) -> None:
        self.uvicorn, self.name, self.has_chat_template = uvicorn, name, has_chat_template


def build_server(
    directory: str | Path,
    *,
    host: str = "localhost",
    port: int = 8000,
    name: str | None = None,
    api_key: Path | None = None,
    allowed_hosts: tuple[str, ...] = (),
    dtype: DType | None = None,
    device: str | None = None,
) -> Server:
    """:func:`serve`, ready but not running yet.

    Raises:
        As :func:`serve`.
    """
    if not is_serve_available():
        raise MissingExtraError("serving needs: pip install 'sparse-bitnet[serve]'")
    if not 0 <= port < 2**16:
        raise ConfigError(f"serve: port {port} is out of range: 0 to {2**16 - 1}")
    hosts, key = door.allowed_hosts(host, allowed_hosts), door.read_key(api_key)
    _check_free(host, port)
    model, tokenizer = load_with_tokenizer(directory, dtype=dtype, device=device)
    make_ready(model)
    name = name or Path(directory).resolve().name
    created = int(Path(directory).stat().st_mtime)
    built = _Unstarted(host=host, port=port, non_blocking=True, log_level="error")

    models: Any = built._model_manager
    models.force_model = name
    models.process_model_name = lambda name: name  # as clients call it, not "name@main"
    models.load_model_and_processor = lambda *_, **__: (model, tokenizer)
    models.get_gen_models = lambda: [
        {"id": name, "object": "model", "owned_by": "sparse-bitnet", "created": created}
    ]
    # By the model's type alone (Qwen, for one) transformers parses every answer as ChatML, and
    # where the chat template writes something else, returns the prompt as part of the answer.
    parses = CHAT_ML in str(tokenizer.chat_template)
    if not parses:
        _return_whole(tokenizer)
    engine = _Engine(model, parses)
    generation: Any = built._generation_state
    generation.get_manager = lambda *_, **__: engine
    _check_before(built._chat_handler, check_chat, tokenizer)
    _check_before(built._completion_handler, check_completion, tokenizer)

    config: Any = built.server.config
    config.http = door.connections(door.MOST_CONNECTIONS)
    config.limit_concurrency = door.MOST_CONNECTIONS + 1  # when not one of them only waits
    config.timeout_graceful_shutdown = SECONDS_TO_FINISH
    _speak_openai(config.app)
    config.app.add_middleware(_Routes)
    most_bytes = BYTES + BYTES_PER_TOKEN * (context_length(model) or 2**17)
    config.app = door.guard(config.app, hosts=hosts, key=key, most_bytes=most_bytes)
    return Server(built.server, name, tokenizer.chat_template is not None)


def _check_free(host: str, port: int) -> None:
    """Say before a model is loaded that nothing can listen there."""
    failed: list[OSError] = []
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"serve: host {host!r} is no address of this machine ({error})") from None
    for family, kind, protocol, _, address in addresses:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            failed.append(error)
    # A machine may know IPv6's localhost and not have it; the others then serve.
    worst = [e for e in failed if e.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)]
    if worst or len(failed) == len(addresses):
        why = (worst or failed)[0].strerror
        raise ConfigError(f"serve: {host}:{port}: {why}; choose another --port or --host")


def _return_whole(tokenizer: Any) -> None:
    """Let the tokenizer find nothing in an answer but its text."""

    def parse_response(ids: Any, *_: Any, **__: Any) -> dict[str, str]:
        return {"content": tokenizer.decode(ids, skip_special_tokens=True)}

    tokenizer.parse_response = parse_response


class _Unstarted(Serve):
    """transformers' server, built and left for us to start."""

    def start_server(self) -> None:
        pass


class _Engine(GenerateManager):
    """One generation after the other on a thread of its own; prompts that do not fit are refused.

    Here because this is where a prompt first exists as tokens, for every route and before the
    first byte of an answer.

    Args:
        parses: let transformers find tool calls and reasoning in answers.
    """

    def __init__(self, model: PreTrainedModel, parses: bool) -> None:
        super().__init__()
        self._parses = parses
        self._context = context_length(model)
        self._gpus = [model.device] if model.device.type == "cuda" else []

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **options: Any
    ) -> Any:
        self._fit(inputs, gen_config)
        if not self._parses:
            options["response_parser"] = None
        return super().generate_streaming(model, processor, inputs, gen_config, *args, **options)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **options: Any
    ) -> Any:
        self._fit(inputs, gen_config)
        if hung_up := _hung_up.get():
            inputs = {**inputs, "stopping_criteria": StoppingCriteriaList([_UntilSet(hung_up)])}
        return await super().generate_non_streaming(
            model, processor, inputs, gen_config, *args, **options
        )

    def submit(self, fn: Any, *args: Any, **options: Any) -> Any:
        return super().submit(self._seeded(fn), *args, **options)

    def async_submit(self, fn: Any, *args: Any, **options: Any) -> Any:
        return super().async_submit(self._seeded(fn), *args, **options)

    def _seeded(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """A generation that draws from its request's seed, if that has one.

        PyTorch has one generator for all threads. Seeded where a request arrives, as transformers
        does, it would change what the generation under way draws, which then changes this one's.
        """
        seed = _seed.get()
        if seed is None:
            return generate

        def seeded(*args: Any, **options: Any) -> Any:
            with torch.random.fork_rng(devices=self._gpus):
                torch.manual_seed(seed)
                return generate(*args, **options)

        return seeded

    def _fit(self, inputs: Any, gen_config: Any) -> None:
        tokens = inputs["input_ids"].shape[-1]
        if tokens == 0:
            raise InvalidRequest("the prompt is empty")
        if self._context is not None:
            room = self._context - tokens
            if room < 1:
                raise InvalidRequest(
                    f"the prompt has {tokens} tokens and the model's context {self._context}; "
                    "shorten it",
                    "context_length_exceeded",
                )
            gen_config.max_new_tokens = min(gen_config.max_new_tokens or room, room)
        if gen_config.temperature and gen_config.do_sample is None:
            gen_config.do_sample = True  # who asks for a temperature wants tokens drawn
        if gen_config.do_sample and gen_config.top_k is None:
            gen_config.top_k = 0  # the API knows no such limit, transformers' default is 50


class _UntilSet(StoppingCriteria):
    """Ends a generation once an event is set."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        return input_ids.new_full((len(input_ids),), self._event.is_set(), dtype=torch.bool)


def _check_before(
    handler: Any,
    check: Callable[[dict[str, Any], PreTrainedTokenizerBase], None],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Let a handler of transformers see checked requests only, and answer when it fails."""
    from jinja2 import TemplateError
    from starlette.exceptions import HTTPException

    handle = handler.handle_request

    async def checked(body: dict[str, Any], request_id: str) -> Any:
        check(body, tokenizer)
        _seed.set(body.get("seed"))
        try:
            return await handle({k: v for k, v in body.items() if k != "seed"}, request_id)
        except (InvalidRequest, HTTPException):
            raise
        except TemplateError as error:
            raise InvalidRequest(f"messages: the chat template says: {error}") from None
        except Exception as error:
            # Left to the server it would also cut the connection, on which others may wait.
            logging.getLogger("uvicorn.error").exception("a request failed")
            message = f"{type(error).__name__}: {str(error)[:500]}"
            raise HTTPException(HTTPStatus.INTERNAL_SERVER_ERROR, message) from error

    handler.handle_request = checked


def _speak_openai(app: Any) -> None:
    """Give every error the form that OpenAI's has."""
    from fastapi import Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    async def refused(_: Request, error: InvalidRequest) -> JSONResponse:
        return JSONResponse(door.error_body(str(error), error.code), HTTPStatus.BAD_REQUEST)

    async def other_status(_: Request, error: HTTPException) -> JSONResponse:
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        return JSONResponse(door.error_body(str(error.detail), kind=kind), error.status_code)

    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        found = error.errors()[0]
        why = found.get("ctx", {}).get("error", "it is no JSON object")
        return JSONResponse(
            door.error_body(f"the body is not understood: {why}"), HTTPStatus.BAD_REQUEST
        )

    app.add_exception_handler(InvalidRequest, refused)
    app.add_exception_handler(HTTPException, other_status)
    app.add_exception_handler(RequestValidationError, malformed)


class _Routes:
    """ASGI middleware: only the routes of text generation, and notice of who hangs up."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from fastapi.responses import JSONResponse

        if scope["type"] == "http" and scope["path"] not in ROUTES:
            message = f"Not Found: {scope['method']} {shown(scope['path'])}"
            answer = JSONResponse(door.error_body(message), HTTPStatus.NOT_FOUND)
            await answer(scope, receive, send)
            return
        caller = _Caller(receive)
        _hung_up.set(caller.hung_up)
        try:
            await self._app(scope, caller.receive, send)
        finally:
            caller.stop_listening()


class _Caller:
    """ASGI's ``receive``, which goes on listening after the body, so that hanging up is noticed.

    Attributes:
        hung_up: set when the connection is closed.
    """

    def __init__(self, receive: Any) -> None:
        self._receive = receive
        self._after_body: asyncio.Task[Any] | None = None
        self.hung_up = threading.Event()

    async def receive(self) -> Any:
        if self._after_body is not None:
            return await asyncio.shield(self._after_body)
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body"):
            self._after_body = asyncio.create_task(self._listen())
        return message

    async def _listen(self) -> Any:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.hung_up.set()
        return message

    def stop_listening(self) -> None:
        if self._after_body is not None:
            self._after_body.cancel()
