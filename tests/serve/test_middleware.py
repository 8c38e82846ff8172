"""The server's middleware over raw sockets, with a small application in the place of the engine."""

import asyncio
import json
import random
import resource
import socket
import threading
import time
from contextlib import contextmanager

import pytest
import uvicorn

from sparse_bitnet.core import ConfigError
from sparse_bitnet.serve import middleware

MOST_BYTES = 1 << 16
KEY = "a-secret"
SECONDS = 20


async def application(scope, receive, send):
    """Says how many bytes came; /stream never ends, /breaks fails in the middle of one."""
    if scope["type"] != "http":
        raise RuntimeError("no lifespan")
    body = (await receive())["body"]
    path = scope["path"]
    if path == "/fails":
        raise RuntimeError("x" * 10_000)
    streams = path in {"/stream", "/breaks"}
    kind = b"text/event-stream" if streams else b"text/plain"
    headers = [(b"content-type", kind)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    while streams:
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        await asyncio.sleep(0.01)
        if path == "/breaks":
            raise RuntimeError('the "device" is on fire')
    await send({"type": "http.response.body", "body": b"%d" % len(body)})


@contextmanager
def serving(
    key=None, hosts=(), most=middleware.MOST_CONNECTIONS, seconds=middleware.SECONDS_TO_ARRIVE
):
    names = middleware.allowed_hosts("0.0.0.0", hosts)
    server = uvicorn.Server(
        uvicorn.Config(
            middleware.guard(application, hosts=names, key=key, most_bytes=MOST_BYTES),
            port=0,
            http=middleware.connections(most, seconds),
            limit_concurrency=most + 1,
            lifespan="off",
            log_level="critical",
            timeout_graceful_shutdown=1,
        )
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1], server
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def port():
    with serving() as (port, _):
        yield port


def connect(port):
    return socket.create_connection(("127.0.0.1", port), timeout=SECONDS)


def everything(connection):
    data = b""
    while more := connection.recv(1 << 16):
        data += more
    return data


def ask(port, text, body=b""):
    """Status and body of the answer to a request that asks to be the last of its connection."""
    with connect(port) as connection:
        connection.sendall(text.encode() + b"\r\nConnection: close\r\n\r\n" + body)
        head, _, answer = everything(connection).partition(b"\r\n\r\n")
    return int(head.split()[1]), answer


def post(port, headers, body=b""):
    return ask(port, f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n{headers}", body)


def chunked(*parts):
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def message_of(answer):
    return json.loads(answer)["error"]["message"]


def test_two_lengths_for_one_body(port):
    headers = "Content-Length: 10\r\nTransfer-Encoding: chunked"
    status, answer = post(port, headers, chunked(b"x" * 100))
    assert status == 400 and "not both" in message_of(answer)


def test_bytes_are_counted_as_they_arrive(port):
    chunks = "Transfer-Encoding: chunked"
    status, answer = post(port, chunks, chunked(b"x" * 100, b"y" * 50))
    assert status == 200 and b"\r\n150\r\n" in answer
    status, answer = post(port, f"Content-Length: {MOST_BYTES + 1}")  # not one byte of them
    assert status == 413 and "at most 65,536 bytes" in message_of(answer)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with connect(port) as connection:
        connection.sendall(f"POST / HTTP/1.1\r\nHost: localhost\r\n{chunks}\r\n\r\n".encode())
        sent = 0
        with pytest.raises(OSError):  # the server answers and hangs up long before
            while sent < 1 << 30:
                sent += connection.send(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
    assert sent < 64 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("evil.example", 400),
        ("localhost.evil.example", 400),
        ("www.localhost", 400),
        ("", 400),
    ],
)
def test_hosts(port, host, status):
    assert ask(port, f"GET / HTTP/1.1\r\nHost: {host}")[0] == status


def test_hosts_that_the_user_names():
    with serving(hosts=["gpu.example", "*.lab.example"]) as (port, _):
        for host in ("gpu.example", "a.lab.example", "localhost"):
            assert ask(port, f"GET / HTTP/1.1\r\nHost: {host}")[0] == 200
        assert ask(port, "GET / HTTP/1.1\r\nHost: lab.example")[0] == 400
    assert middleware.allowed_hosts("192.168.0.2", ()) == [*middleware.LOCAL_NAMES, "192.168.0.2"]
    assert middleware.allowed_hosts("fe80::1", ())[-1] == "[fe80::1]"
    for wrong in ("", "a*", "*a", "*.a.*"):
        with pytest.raises(ConfigError, match="is no host name"):
            middleware.allowed_hosts("localhost", [wrong])


def test_a_key():
    with serving(key=KEY) as (port, _):

        def status(path, *headers):
            lines = "\r\n".join(["Host: localhost", *headers])
            return ask(port, f"GET {path} HTTP/1.1\r\n{lines}")[0]

        assert status("/v1/models", f"Authorization: Bearer {KEY}") == 200
        assert status("/health") == 200
        for wrong in ("", f"Bearer {KEY}x", "Bearer ", KEY, "Bearer \xff"):
            assert status("/v1/models", f"Authorization: {wrong}") == 401
        assert status("/v1/models") == 401


def test_where_the_key_comes_from(tmp_path, monkeypatch):
    monkeypatch.delenv(middleware.KEY_VARIABLE, raising=False)
    assert middleware.read_key(None) is None
    monkeypatch.setenv(middleware.KEY_VARIABLE, "from-the-environment")
    assert middleware.read_key(None) == "from-the-environment"
    path = tmp_path / "key"
    path.write_text("from-a-file\n")
    assert middleware.read_key(path) == "from-a-file"
    for wrong in ("", " \n", "two words", "ключ"):
        path.write_text(wrong)
        with pytest.raises(ConfigError, match="has to be printable ASCII"):
            middleware.read_key(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        middleware.read_key(tmp_path / "missing")


def test_failures(port):
    status, answer = ask(port, "GET /fails HTTP/1.1\r\nHost: localhost")
    assert status == 500 and message_of(answer).startswith("RuntimeError: xxx")
    assert len(answer) < 1000
    _, answer = ask(port, "GET /breaks HTTP/1.1\r\nHost: localhost")
    event = answer.split(b"data: ")[2].split(b"\n\n")[0]
    assert message_of(event) == 'RuntimeError: the "device" is on fire'
    assert answer.endswith(b"0\r\n\r\n")  # the end of a whole answer, not a cut connection


def test_a_stream_that_the_end_of_the_server_cuts_off():
    with serving() as (port, server), connect(port) as connection:
        connection.sendall(b"GET /stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
        connection.recv(100)
        server.should_exit = True
        answer = everything(connection)
    last = answer.split(b"data: ")[-1].split(b"\n\n")[0]
    assert message_of(last) == "the server is shutting down"
    assert answer.endswith(b"0\r\n\r\n")


def test_idle_connections_lock_nobody_out():
    with serving(most=16) as (port, _):
        idle = [connect(port) for _ in range(50)]
        for connection in idle[40:]:
            connection.sendall(b"GET / HT")
        for _ in range(3):
            assert ask(port, "GET / HTTP/1.1\r\nHost: localhost")[0] == 200
        closed = 0
        for connection in idle:
            connection.settimeout(0.01)
            try:
                closed += connection.recv(1) == b""
            except ConnectionResetError:
                closed += 1
            except TimeoutError:
                pass
            connection.close()
        assert closed >= 34


def test_connections_that_are_all_at_work():
    with serving(most=3) as (port, _):
        busy = [connect(port) for _ in range(3)]
        for connection in busy:
            connection.sendall(b"GET /stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"200 OK" in connection.recv(100)
        assert ask(port, "GET / HTTP/1.1\r\nHost: localhost")[0] == 503
        for connection in busy:
            assert connection.recv(100)  # they go on
            connection.close()


@pytest.mark.parametrize(
    "beginning",
    [
        b"",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nX-Slow: ",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\nGET / HTTP/1.1\r\nX: ",
    ],
)
def test_a_request_has_to_arrive_in_time(beginning):
    """However steadily it drips."""
    with serving(seconds=0.5) as (port, _), connect(port) as connection:
        started = time.monotonic()
        connection.settimeout(0.05)
        connection.sendall(beginning)
        with pytest.raises(ConnectionError):
            while time.monotonic() - started < 10:
                connection.sendall(b"x" if beginning else b"")
                try:
                    if not connection.recv(4096):
                        raise ConnectionResetError
                except TimeoutError:
                    pass
        assert 0.4 < time.monotonic() - started < 3


PIECES = [
    *[b"GET / HTTP/1.1\r\n", b"POST / HTTP/1.1\r\n", b"Host: localhost\r\n", b"\r\n", b"\r\n\r\n"],
    *[b"Content-Length: 5\r\n", b"Content-Length: -1\r\n", b"Content-Length: " + b"9" * 5000],
    *[b"Transfer-Encoding: chunked\r\n", b"5\r\nhello\r\n", b"0\r\n\r\n", b"fffffffffffffffff\r\n"],
    *[
        b"Expect: 100-continue\r\n",
        b"Connection: Upgrade\r\nUpgrade: websocket\r\n",
        b"\n",
        b"\x00",
    ],
    *[
        b"GET http://x/%zz?\xff HTTP/9.9\r\n",
        b"Authorization: \xff\xfe\r\n",
        b"Host:\r\n",
        b":\r\n",
    ],
    *[
        b"X: " + b"a" * 70_000,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
        b"hello",
    ],
]


def speak(port, seeds, answers):
    for seed in seeds:
        rng = random.Random(seed)
        data = b"".join(rng.choices(PIECES, k=rng.randint(1, 9)))
        if rng.random() < 0.3:
            data = b"POST / HTTP/1.1\r\nHost: localhost\r\n" + data
        if rng.random() < 0.5:
            place = rng.randrange(len(data))
            data = data[:place] + rng.randbytes(rng.randint(1, 8)) + data[place + 1 :]
        with connect(port) as connection:
            try:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                answer = everything(connection)
            except OSError:
                answer = b""
        if answer:
            status = int(answer.split()[1])
            assert status in {100, 200, 400, 411, 413, 431, 501}, (seed, data, answer)
            answers[status] = answers.get(status, 0) + 1


def check_raw_requests(count):
    answers = {}
    with serving(seconds=2) as (port, server):
        speak(port, range(count), answers)
        assert ask(port, "GET / HTTP/1.1\r\nHost: localhost")[0] == 200
        time.sleep(0.2)
        assert not server.server_state.connections and not server.server_state.tasks
    assert answers[200] and answers[400]


def test_raw_requests():
    check_raw_requests(300)


@pytest.mark.slow
def test_ten_thousand_raw_requests():
    check_raw_requests(10_000)
