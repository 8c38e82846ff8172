"""The verb ``serve``: a model behind OpenAI's HTTP routes.

engine.py computes many answers at once, app.py speaks HTTP, requests.py validates bodies, and
middleware.py limits hosts, keys, sizes and times.
"""

from __future__ import annotations

import errno
import logging
import socket
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import tyro
from packaging.version import Version

from sparse_bitnet.console import say
from sparse_bitnet.core import ConfigError, MissingExtraError
from sparse_bitnet.packed.load import DType, load_with_tokenizer
from sparse_bitnet.serve.engine import MOST_RUNNING, MOST_WAITING, Engine

BYTES, BYTES_PER_TOKEN = 1 << 20, 64  # a request has at most so many, by the model's context
SECONDS_TO_FINISH = 5  # for streams under way when the server is stopped
TRANSFORMERS = Version("5.19")  # its batches can be paused, and keep to the attention asked for
PACKAGES = ("starlette", "uvicorn", "prometheus_client", "jinja2")


@dataclass(frozen=True)
class Options:
    """How a model is served."""

    host: str = "localhost"  # address to listen on; 0.0.0.0 for every network of this machine
    port: int = 8000  # to listen on
    name: str | None = None  # what clients call the model; the directory's name when left out
    # file with the key that clients must send; SPARSE_BITNET_API_KEY when left out
    api_key: Path | None = None
    # names of this server beside localhost and host that clients may use: NAME, or *.NAME, or * for
    # any
    allowed_hosts: tuple[str, ...] = ()
    # web pages that may use the server from a browser, such as http://localhost:3000; * for any
    cors_origins: tuple[str, ...] = ()
    # tokens of all sequences at once that the key-value cache has room for; chosen from free memory
    # when left out
    cache_tokens: int | None = None
    max_running: int = MOST_RUNNING  # sequences that are computed at once
    # sequences that wait for a place; beyond, requests get status 429
    max_waiting: int = MOST_WAITING
    dtype: DType | None = None  # to compute in; the stored one when left out
    device: str | None = None  # the GPU when left out, if there is one


DEFAULTS = Options()


def serve(model: Path, *, server: tyro.conf.OmitArgPrefixes[Options] = DEFAULTS) -> None:
    """Serve a packed or trained model to OpenAI clients, until Ctrl-C.

    Routes: /v1/chat/completions and /v1/completions, streaming or not, /v1/models, /health,
    /metrics. Many requests are computed at once. Without an API key anyone who reaches the port may
    use it.

    Args:
        model: directory of the model and its tokenizer, or a GGUF file.
        server: where and how.

    Raises:
        MissingExtraError: without the extra ``serve``.
        ConfigError: for a port out of range or taken, or a directory without tokenizer.
        PackedFormatError, CheckpointError: if the directory cannot be loaded.
    """
    built = build_server(model, server)
    chat = "" if built.has_chat_template else " (no chat template: /v1/completions only)"
    address = f"http://{server.host}:{server.port}/v1"
    say(f"serving {built.name} at {address}{chat}; Ctrl-C stops")
    try:
        built.uvicorn.run()
    finally:
        built.engine.close()


class Server(NamedTuple):
    """What :func:`build_server` made: ``uvicorn`` runs it, ``name`` is the model's."""

    uvicorn: Any
    engine: Engine
    name: str
    has_chat_template: bool


def build_server(directory: str | Path, options: Options = DEFAULTS) -> Server:
    """:func:`serve`, ready but not listening yet; its engine runs until it is closed.

    Raises:
        As :func:`serve`.
    """
    old = Version(version("transformers")) < TRANSFORMERS
    if old or not all(map(find_spec, PACKAGES)):
        raise MissingExtraError(
            f"serving needs transformers {TRANSFORMERS} and more: "
            "pip install 'sparse-bitnet[serve]'"
        )
    import uvicorn
    from starlette.middleware.cors import CORSMiddleware

    from sparse_bitnet.serve import middleware
    from sparse_bitnet.serve.app import build_app

    class _Patient(uvicorn.Server):
        """A second Ctrl-C does not tear down what ends within seconds."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            super().handle_exit(sig, frame)
            self.force_exit = False

    host, port = options.host, options.port
    if not 0 <= port < 2**16:
        raise ConfigError(f"serve: --port {port} is out of range: 0 to {2**16 - 1}")
    hosts = middleware.allowed_hosts(host, options.allowed_hosts)
    key = middleware.read_key(options.api_key)
    _check_free(host, port)
    model, tokenizer = load_with_tokenizer(directory, dtype=options.dtype, device=options.device)
    engine = Engine(model, options.cache_tokens, options.max_running, options.max_waiting)
    name = options.name or Path(directory).resolve().name
    app: Any = build_app(engine, tokenizer, name, int(Path(directory).stat().st_mtime))
    most_bytes = BYTES + BYTES_PER_TOKEN * min(engine.context, 2**20)
    app = middleware.guard(app, hosts=hosts, key=key, most_bytes=most_bytes)
    if origins := options.cors_origins:
        app = CORSMiddleware(app, origins, allow_methods=["GET", "POST"], allow_headers=["*"])
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=middleware.connections(),
        ws="none",
        limit_concurrency=middleware.MOST_CONNECTIONS + 1,  # when not one of them only waits
        timeout_graceful_shutdown=SECONDS_TO_FINISH,
        server_header=False,
        log_level="error",
    )
    logging.getLogger("uvicorn.error").addFilter(_is_no_goodbye)
    return Server(_Patient(config), engine, name, tokenizer.chat_template is not None)


def _is_no_goodbye(record: logging.LogRecord) -> bool:
    """False for what uvicorn logs as an error when answers outlast :data:`SECONDS_TO_FINISH`."""
    return "graceful shutdown exceeded" not in record.msg


def _check_free(host: str, port: int) -> None:
    """Say before a model is loaded that nothing can listen there."""
    failed: list[OSError] = []
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"serve: --host {host!r} is no address of this machine ({error})"
        ) from None
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
