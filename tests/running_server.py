"""A server of a model directory on a free port, for tests that talk to it over HTTP."""

import threading
import time
from contextlib import contextmanager

from sparse_bitnet.serve import serve as serving
from sparse_bitnet.serve.sampling import Sampler, Token


@contextmanager
def running(directory, **options):
    """Its address, while the block runs; it has to end within 20 seconds after that."""
    built = serving.build_server(directory, serving.Options(host="127.0.0.1", port=0, **options))
    thread = threading.Thread(target=built.uvicorn.run, daemon=True)
    thread.start()
    while not built.uvicorn.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{built.uvicorn.servers[0].sockets[0].getsockname()[1]}"
    finally:
        built.uvicorn.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()


def let_say(monkeypatch, script):
    """Let every model say these tokens, whatever it is asked."""

    def choose(sampler, _logits):
        token = script[sum(sampler._counts.values())]
        sampler._counts[token] = sampler._counts.get(token, 0) + 1
        return Token(token, None if sampler.options.logprobs is None else 0.0)

    monkeypatch.setattr(Sampler, "choose", choose)
    monkeypatch.setattr(Sampler, "is_argmax", False)
