"""ASGI middleware of the HTTP server: hosts, API key, body sizes, connection limits.

Plain ASGI, so that it knows nothing of the engine behind it. From outside to inside:

- :func:`connections` makes uvicorn's protocol class: a request has to arrive whole within
  ``SECONDS_TO_ARRIVE``, and beyond a number of connections the one that has waited longest without
  a request makes room, so that idle connections lock nobody out;
- starlette's TrustedHostMiddleware refuses host names that nobody allowed (DNS rebinding);
- :class:`ApiKey` compares the key in constant time;
- :class:`Limits` counts a body's bytes as they arrive, turns failures into OpenAI's error form, and
  ends a broken or interrupted stream by an error event.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from sparse_bitnet.core import ConfigError
from sparse_bitnet.core.errors import shown

SECONDS_TO_ARRIVE = 30  # from a request's first byte to the end of its body
MOST_CONNECTIONS = 256
KEY_VARIABLE = "SPARSE_BITNET_API_KEY"
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
EVERY_ADDRESS = ("", "0.0.0.0", "::")
LOG = logging.getLogger("uvicorn.error")


def guard(app: Any, *, hosts: Sequence[str], key: str | None, most_bytes: int) -> Any:
    """The ASGI application behind all middleware."""
    if key is not None:
        app = ApiKey(app, key)
    return TrustedHostMiddleware(Limits(app, most_bytes), hosts, www_redirect=False)


def allowed_hosts(host: str, more: Sequence[str]) -> list[str]:
    """Host names that requests may name: this machine's own, ``host``, and ``more``.

    Raises:
        ConfigError: for a pattern that is neither a name, ``*.name`` nor ``*``.
    """
    for name in more:
        if not name or "*" in name[1:] or (name.startswith("*") and name[1:2] not in ("", ".")):
            raise ConfigError(
                f"serve: allowed host {shown(name)} is no host name, *.NAME or * (any host)"
            )
    own = f"[{host}]" if ":" in host else host
    return [*LOCAL_NAMES, *([] if host in EVERY_ADDRESS else [own]), *more]


def read_key(path: Path | None) -> str | None:
    """The API key in a file, or else in the environment; None if there is neither.

    Raises:
        ConfigError: if the file cannot be read, or the key is empty or not printable ASCII.
    """
    if path is not None:
        try:
            key, where = path.read_text(encoding="utf-8").strip(), str(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"serve: the API key cannot be read from {path}: {error}") from None
    elif KEY_VARIABLE in os.environ:
        key, where = os.environ[KEY_VARIABLE].strip(), KEY_VARIABLE
    else:
        return None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"serve: the API key in {where} has to be printable ASCII, not empty")
    return key


def error_body(
    message: str, code: str | None = None, kind: str = "invalid_request_error"
) -> dict[str, Any]:
    """An error in OpenAI's form."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def error_event(message: str) -> bytes:
    """The server's own failure as an event of a stream."""
    return b"data: " + json.dumps(error_body(message, kind="server_error")).encode() + b"\n\n"


class ApiKey:
    """ASGI middleware: ``Authorization: Bearer KEY`` on all routes but /health and the page."""

    def __init__(self, app: Any, key: str) -> None:
        self._app, self._expected = app, b"Bearer " + key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        if (
            scope["type"] != "http"
            or scope["path"] in ("/health", "/")
            or hmac.compare_digest(given, self._expected)
        ):
            await self._app(scope, receive, send)
            return
        body = error_body("the API key is missing or wrong", "invalid_api_key")
        headers = {"WWW-Authenticate": "Bearer"}
        await JSONResponse(body, HTTPStatus.UNAUTHORIZED, headers)(scope, receive, send)


class Limits:
    """ASGI middleware: bodies of bounded size, and answers that end in order.

    The body is read whole before the application is called. A client that hangs up cancels nothing
    by itself: ``receive`` then gives ``http.disconnect``, as ASGI has it. Bodies are bounded:
    a prompt is tokenized before its length is known, and nobody else is served meanwhile.
    """

    def __init__(self, app: Any, most_bytes: int) -> None:
        self._app, self._most_bytes = app, most_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(scope, receive, send)
        names = [name for name, _ in scope["headers"]]
        if b"content-length" in names and b"transfer-encoding" in names:
            # Two lengths for one body: proxies and servers disagree on which one counts.
            message = "a request has Content-Length or Transfer-Encoding, not both"
            await answer.fail(HTTPStatus.BAD_REQUEST, message)
            return
        body = await self._read(scope, receive)
        if body is None:
            message = f"a request has at most {self._most_bytes:,} bytes"
            await answer.fail(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)
            return
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Any:
            return messages.pop() if messages else await receive()

        try:
            await self._app(scope, replay, answer.send)
        except asyncio.CancelledError:  # the server stops and has waited long enough
            await answer.fail(HTTPStatus.SERVICE_UNAVAILABLE, "the server is shutting down")
        except Exception as error:
            LOG.exception("a request failed")
            message = f"{type(error).__name__}: {str(error)[:500]}"
            await answer.fail(HTTPStatus.INTERNAL_SERVER_ERROR, message)

    async def _read(self, scope: Any, receive: Any) -> bytes | None:
        """The body; None if it is too long, counted whatever its header says, or never ends."""
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if int(length) > self._most_bytes:
            return None
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._most_bytes:
                return None
            if not message.get("more_body"):
                return bytes(body)


class _Answer:
    """ASGI's ``send``, which knows how far the answer is."""

    def __init__(self, scope: Any, receive: Any, send: Any) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._started = self._ended = self._streams = False

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self._started = True
            kind = dict(message.get("headers", ())).get(b"content-type", b"")
            self._streams = kind.startswith(b"text/event-stream")
        elif not message.get("more_body"):
            self._ended = True
        await self._send(message)

    async def fail(self, status: HTTPStatus, message: str) -> None:
        """End the answer by an error: as a status, or in a stream as its last event.

        The connection is closed, as the rest of a body may still be on its way.
        """
        if self._ended:
            return
        if not self._started:
            is_ours = status >= HTTPStatus.INTERNAL_SERVER_ERROR
            body = error_body(message, kind="server_error" if is_ours else "invalid_request_error")
            response = JSONResponse(body, status, {"Connection": "close"})
            await response(self._scope, self._receive, self._send)
        elif self._streams:
            event = error_event(message)
            await self._send({"type": "http.response.body", "body": event, "more_body": False})
        # Half a body of known length cannot be mended: uvicorn closes the connection.


def connections(most: int = MOST_CONNECTIONS, seconds: float = SECONDS_TO_ARRIVE) -> type:
    """uvicorn's protocol of one connection, with a time limit for requests and a bound for all.

    uvicorn itself ends connections that idle between requests (``timeout_keep_alive``), but waits
    for a first request, and for the rest of any, for ever.
    """
    waiting: dict[Any, None] = {}  # connections without a whole request, longest waiting first

    class Connection(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > most and waiting:
                longest = next(iter(waiting))
                waiting.pop(longest)
                longest.transport.abort()
            self._follow()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._follow()

        def on_response_complete(self) -> None:
            self._stop_timer()
            super().on_response_complete()
            self._follow()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            waiting.pop(self, None)
            super().connection_lost(exc)

        def _follow(self) -> None:
            """Start or stop the clock, by whether a whole request is there."""
            cycle = self.cycle
            if cycle is None or cycle.response_complete or cycle.more_body:
                waiting.setdefault(self)
                if self._timer is None and not self.transport.is_closing():
                    self._timer = self.loop.call_later(seconds, self.transport.abort)
            else:
                self._stop_timer()
                waiting.pop(self, None)

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Connection
