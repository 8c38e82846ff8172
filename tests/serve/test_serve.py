"""The HTTP server over loopback, asked by the openai client: answers, errors, and it lives on."""

import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import requests
import torch

from sparse_bitnet.core import ConfigError, MissingExtraError
from sparse_bitnet.deploy.packed.packing import pack
from sparse_bitnet.deploy.packed.pretrained import load
from sparse_bitnet.serve import serve as serving
from sparse_bitnet.serve.generate import generate_text
from sparse_bitnet.serve.requests import FIELDS

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}"
    "{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
)
USER = [{"role": "user", "content": "def main():"}]
SECONDS = 60


@pytest.fixture(scope="module")
def directory(tmp_path_factory, trained, tokenizer):
    """A packed model that can chat, with room for long answers and nothing that ends them."""
    path = tmp_path_factory.mktemp("serve") / "tiny"
    model = trained("qwen2-untied")
    with torch.no_grad():  # says what can be read
        for token in range(300):
            if not (0 < token < len(tokenizer) and tokenizer.decode([token]).isascii()):
                model.lm_head.weight[token] = 0
    model.config.max_position_embeddings = 512
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    tokenizer.chat_template = TEMPLATE
    pack(model, path, tokenizer=tokenizer)
    tokenizer.chat_template = None
    return path


def start(directory):
    built = serving.build_server(directory, host="127.0.0.1", port=0)
    thread = threading.Thread(target=built.uvicorn.run, daemon=True)
    thread.start()
    while not built.uvicorn.started:
        time.sleep(0.01)
    port = built.uvicorn.servers[0].sockets[0].getsockname()[1]
    return built, thread, f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def url(directory):
    built, thread, url = start(directory)
    yield url
    built.uvicorn.should_exit = True
    thread.join(timeout=10)
    assert not thread.is_alive()


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=SECONDS, max_retries=0) as c:
        yield c


def complete(client, prompt="def main():", **options):
    return client.completions.create(model="tiny", prompt=prompt, max_tokens=12, **options)


@pytest.fixture(autouse=True)
def lives_on(request):
    """After whatever a test did, the server answers as before."""
    client = request.getfixturevalue("client") if "client" in request.fixturenames else None
    yield
    if client is not None:
        assert complete(client).choices[0].text == complete(client).choices[0].text != ""


def test_says_what_generate_says(client, directory):
    model, tokenizer = load(directory)
    expected = generate_text(model, tokenizer, "def main():", 12)
    answer = complete(client)
    assert answer.choices[0].text == expected
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12 and answer.model == "tiny"
    streamed = list(complete(client, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == expected
    assert len(streamed) > 3 and streamed[-1].choices[0].finish_reason == "length"
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_chats(client, directory):
    options = {"model": "tiny", "messages": USER, "max_tokens": 10}
    answer = client.chat.completions.create(**options).choices[0].message
    assert answer.role == "assistant"
    pieces = client.chat.completions.create(stream=True, **options)
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    model, tokenizer = load(directory)
    expected = generate_text(model, tokenizer, "user: def main():\nassistant:", 10)
    assert text == answer.content == expected
    parts = [{"role": "user", "content": [{"type": "text", "text": "def main():"}]}]
    assert client.chat.completions.create(model="tiny", messages=parts, max_tokens=1)


def test_a_temperature_draws_and_a_seed_repeats(client):
    def draw(seed):
        return complete(client, temperature=1.5, seed=seed).choices[0].text

    assert draw(1) == draw(1) != draw(2)


def test_two_clients_at_once(client, url):
    def ask(prompt):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=SECONDS) as other:
            return "".join(c.choices[0].text for c in complete(other, prompt, stream=True))

    prompts = ["def main():", "return the name", "file of the name", "main"]
    alone = [ask(prompt) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, prompts)) == alone


@pytest.mark.parametrize("stream", [False, True])
def test_a_seed_repeats_beside_other_requests(client, url, stream):
    def draw(seed):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=SECONDS) as other:
            answer = complete(other, temperature=1.5, seed=seed, stream=stream)
            chunks = answer if stream else [answer]
            return "".join(chunk.choices[0].text for chunk in chunks)

    seeds = list(range(8))
    alone = [draw(seed) for seed in seeds]
    complete(client)  # comes behind the last one, whose stream may have ended before it did
    before = torch.random.get_rng_state()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(draw, seeds)) == alone
    assert len(set(alone)) == 8
    complete(client)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.fixture
def steps(monkeypatch):
    """Grows by one for each step of a generation, which takes its time."""
    counted = []
    forward = torch.nn.Embedding.forward

    def slowly(*arguments):
        counted.append(time.sleep(0.003))
        return forward(*arguments)

    monkeypatch.setattr(torch.nn.Embedding, "forward", slowly)
    return counted


def test_whoever_hangs_up_frees_the_engine(client, url, steps):
    options = {"model": "tiny", "prompt": "def main():", "max_tokens": 480}
    for _ in range(3):  # as clients try again after a time-out
        with pytest.raises(requests.Timeout):
            requests.post(f"{url}/v1/completions", json=options, timeout=0.1)
    complete(client)  # waits for the engine
    assert len(steps) < 300


def test_a_cancelled_stream_frees_the_engine(client, steps):
    stream = client.completions.create(
        model="tiny", prompt="def main():", max_tokens=480, stream=True
    )
    next(iter(stream))
    stream.close()
    complete(client)  # waits for the engine
    assert len(steps) < 300


def refused(call, status, message):
    with pytest.raises(openai.APIStatusError) as caught:
        call()
    assert caught.value.status_code == status
    body = caught.value.body
    assert message in body["message"], body
    return body


def test_a_field_that_does_not_exist(client):
    refused(lambda: complete(client, extra_body={"colour": "red"}), 422, "Unexpected fields")


def test_an_over_long_prompt(client):
    for stream in (False, True):
        body = refused(
            lambda stream=stream: complete(client, "return the " * 700, stream=stream),
            400,
            "the model's context 512; shorten it",
        )
        assert body["code"] == "context_length_exceeded"
    answer = client.completions.create(model="tiny", prompt="def main():", max_tokens=10**6)
    assert answer.usage.total_tokens == 512 and answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"temperature": "hot"},
            "temperature is 'hot'; it has to be 0, or a number from 1e-30 to 2",
        ),
        ({"temperature": -1}, "temperature is '-1'"),
        ({"temperature": True}, "temperature is 'True'"),
        ({"top_p": 0}, "top_p is '0'"),
        ({"seed": 1.5}, "seed is '1.5'"),
        ({"seed": 10**30}, "seed is '1000000"),
        ({"stop": ""}, "stop is ''"),
        ({"stop": [1]}, "stop is '[1]'"),
        ({"stop": "x" * 129}, "it has to be 1 to 128 characters"),
        ({"stop": ["x"] * 17}, "or up to 16 such strings"),
        ({"n": 3}, "n is '3'; it has to be 1, which is what this server gives"),
        ({"logprobs": 5}, "logprobs is '5'"),
        ({"echo": True}, "echo is 'True'"),
        ({"logit_bias": {"7": 1}}, "logit_bias is"),
        ({"extra_body": {"generation_config": "{}"}}, "generation_config is '{}'"),
        ({"extra_body": {"stream": "yes"}}, "stream is 'yes'"),
        ({"extra_body": {"max_tokens": 0}}, "max_tokens is '0'"),
        ({"extra_body": {"prompt": ["a", "b"]}}, "prompt is"),
        ({"extra_body": {"prompt": None}}, "prompt is 'None'"),
        ({"extra_body": {"prompt": ""}}, "the prompt is empty"),
        ({"extra_body": {"model": "gpt-7"}}, "Server is pinned to 'tiny'; requested 'gpt-7'"),
    ],
)
def test_fields_that_make_no_sense(client, options, message):
    refused(lambda: complete(client, **options), 400, message)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is '[]'"),
        ("hello", "messages is 'hello'"),
        (["hello"], "messages[0] is 'hello'"),
        ([{"content": "x"}], "messages[0].role is 'None'"),
        ([{"role": "king", "content": "x"}], "messages[0].role is 'king'"),
        ([{"role": "user"}], "messages[0].content is 'None'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content is"),
        ([*USER, {"role": "user", "content": 5}], "messages[1].content is '5'"),
        ([{"role": "tool", "content": "x"}], "the chat template says: no tools here"),
    ],
)
def test_messages_that_make_no_sense(client, messages, message):
    refused(lambda: client.chat.completions.create(model="tiny", messages=messages), 400, message)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is not understood"),
        (b"{", "the body is not understood: "),
        (b'{"model": "tiny", "prompt": }', "the body is not understood: Expecting value"),
        (b"[]", "the body is not understood: it is no JSON object"),
        (b"\xff\xfe", ""),
        (b"[" * 100_000, ""),
        (b'{"prompt": "\\ud800"}', "half a character"),
        (b'{"prompt": "x", "stop": ["a", "\\udfff"]}', "stop is "),
        (b'{"prompt": "x", "suffix": "\\udfff"}', "suffix is "),
        (b'{"prompt": "x", "model": "\\udfff"}', "model is "),
        (b'{"prompt": "x", "user": {"a": ["\\ud800"]}}', "half a character"),
        (b'{"prompt": "x", "temperature": 1e-40}', "temperature is '1e-40'"),
        (b'{"prompt": "x", "temperature": NaN}', "temperature is 'nan'"),
        (b'{"prompt": "x", "temperature": 1e999}', "temperature is 'inf'"),
    ],
)
def test_malformed_json(client, url, body, message):
    headers = {"Content-Type": "application/json"}
    answer = requests.post(f"{url}/v1/completions", data=body, headers=headers, timeout=SECONDS)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize("tool", ['{"name": "\\udfff"}', '{"\\udfff": 1}', f'{{"a":{"[" * 5000}'])
def test_tools_that_are_no_text(url, tool):
    closed = tool + "]" * tool.count("[") + "}" * (tool.count("{") - tool.count("}"))
    body = f'{{"messages": {json.dumps(USER)}, "max_tokens": 1, "tools": [{closed}]}}'
    headers = {"Content-Type": "application/json"}
    address = f"{url}/v1/chat/completions"
    answer = requests.post(address, data=body, headers=headers, timeout=SECONDS)
    assert answer.status_code == 400, answer.text


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "return_tensors", "tools"])
def test_arguments_of_the_template_that_are_not_for_clients(client, name):
    kwargs = {"chat_template_kwargs": {name: "{% for i in range(10**9) %}{% endfor %}"}}
    refused(
        lambda: client.chat.completions.create(model="tiny", messages=USER, extra_body=kwargs),
        400,
        f"chat_template_kwargs.{name} is not for requests to set",
    )
    mild = {"chat_template_kwargs": {"enable_thinking": True}, "max_tokens": 1}
    assert client.chat.completions.create(model="tiny", messages=USER, extra_body=mild)


JUNK = [
    *[None, True, 0, -1, 1, 2.5, 10**40, 1e-300, float("inf"), "", "x", "\ud800", "\x00" * 9],
    *[[], [None], [[]], {}, {"role": "user"}, {"type": "text"}, "tiny", [{"role": "user"}], "日本"],
]


def test_no_junk_in_any_field_is_an_internal_error(client, url):
    rng = random.Random(0)
    known = [*FIELDS, "stream_options", "user", "metadata", "tool_choice"]
    for _ in range(150):
        chat = rng.random() < 0.5
        body = {"messages": USER} if chat else {"prompt": "def"}
        body |= {"model": "tiny", "max_tokens": 2}
        for name in rng.sample([*known, "messages", "prompt"], rng.choice([1, 1, 2])):
            body[name] = rng.choice(JUNK)
        if rng.random() < 0.2:
            body["messages"] = [
                {"role": "user", "content": rng.choice(JUNK), "x": rng.choice(JUNK)}
            ]
        path = "chat/completions" if chat else "completions"
        data = json.dumps(body)
        answer = requests.post(f"{url}/v1/{path}", data=data, timeout=SECONDS)
        assert answer.status_code in {200, 400, 422}, (data, answer.text)
        assert "error" not in answer.text or answer.status_code != 200, (data, answer.text)


def test_other_routes_and_methods(client, url):
    for path in ("/load_model", "/reset", "/v1/responses", "/v1/audio/transcriptions", "/"):
        answer = requests.post(f"{url}{path}", json={"model": "/etc"})
        assert answer.status_code == 404 and path in answer.json()["error"]["message"]
    answer = requests.get(f"{url}/v1/completions")
    assert answer.status_code == 405 and answer.json()["error"]["message"]
    assert requests.get(f"{url}/health").json() == {"status": "ok"}


def test_a_failure_inside_is_status_500_and_no_more(client, monkeypatch):
    from transformers import Qwen2ForCausalLM

    def broken(*_, **__):
        raise RuntimeError("the device is on fire")

    with monkeypatch.context() as patch:
        patch.setattr(Qwen2ForCausalLM, "forward", broken)
        body = refused(lambda: complete(client), 500, "RuntimeError: the device is on fire")
        assert body["type"] == "server_error"
        with pytest.raises(openai.APIError) as caught:
            list(complete(client, stream=True))
        assert caught.value.body == "the device is on fire"


def test_without_a_chat_template(pristine):
    built, thread, url = start(pristine / "two-bit")
    assert not built.has_chat_template
    answer = requests.post(f"{url}/v1/chat/completions", json={"messages": USER}, timeout=SECONDS)
    assert answer.status_code == 400
    assert "no chat template" in json.dumps(answer.json())
    built.uvicorn.should_exit = True
    thread.join(timeout=10)


def test_refuses_to_start(pristine, monkeypatch):
    with pytest.raises(ConfigError, match="serve: port 70000 is out of range"):
        serving.serve(pristine / "two-bit", port=70000)
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"serve: localhost:{port}: Address already in use"):
            serving.serve(pristine / "two-bit", port=port)
    with pytest.raises(ConfigError, match=r"serve: 192.0.2.1:0: Cannot assign requested address"):
        serving.serve(pristine / "two-bit", host="192.0.2.1", port=0)
    with pytest.raises(ConfigError, match=r"serve: host '\.' is no address of this machine"):
        serving.serve(pristine / "two-bit", host=".")
    monkeypatch.setattr(serving, "is_serve_available", lambda: False)
    with pytest.raises(MissingExtraError, match=r"pip install 'sparse-bitnet\[serve\]'"):
        serving.serve(pristine / "two-bit")


@pytest.mark.slow  # seconds of imports
def test_the_verb_serves_until_it_is_interrupted(directory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "sparse_bitnet", "serve", str(directory), "--port", str(port), "--name", "it"]
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        with openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none") as client:
            for _ in range(SECONDS):
                try:
                    assert [model.id for model in client.models.list()] == ["it"]
                    break
                except openai.APIConnectionError:
                    assert process.poll() is None, process.communicate()[0]
                    time.sleep(1)
            stream = client.completions.create(
                model="it", prompt="def", max_tokens=400, stream=True
            )
            next(iter(stream))
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=SECONDS)[0]
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in said, said
    assert "serving it at http://localhost" in said
