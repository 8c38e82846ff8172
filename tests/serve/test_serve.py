"""The HTTP server over loopback, asked by the openai client: answers, errors, and it lives on."""

import json
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import get_type_hints

import openai
import pytest
import requests
import torch

from packed_models import pack_readable
from running_server import let_say, running
from sparse_bitnet.core import ConfigError, MissingExtraError
from sparse_bitnet.modeling import DecoderForCausalLM
from sparse_bitnet.packed.load import load
from sparse_bitnet.serve import serve as serving
from sparse_bitnet.serve.generate import encode_chat, generate_text
from sparse_bitnet.serve.requests import Chat, Completion, read

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}"
    "{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
)
USER = [{"role": "user", "content": "def main():"}]
SECONDS = 60


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("serve") / "tiny"
    return pack_readable(path, TEMPLATE, 512, tokenizer)


@pytest.fixture
def long_directory(directory, tmp_path):
    """The same with a context that no answer fills before the server gives up waiting."""
    path = tmp_path / "long"
    shutil.copytree(directory, path)
    config = json.loads((path / "config.json").read_text())
    config["max_position_embeddings"] = 2**19
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def url(directory):
    with running(directory) as url:
        yield url


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=SECONDS, max_retries=0) as c:
        yield c


def complete(client, prompt="def main():", **options):
    options = {"max_tokens": 12} | options
    return client.completions.create(model="tiny", prompt=prompt, **options)


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
    parts = [{"type": "text", "text": text} for text in ("def main():", "return")]
    one, other = (
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": content}], max_tokens=10
        )
        for content in (parts, "def main():\nreturn")
    )
    assert one.usage == other.usage and one.choices == other.choices


def test_a_template_that_reads_parts_alone_gets_them(tokenizer):
    parts = [{"type": "text", "text": "def main():"}]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}{% for part in m.content %}"
        "{% if part['type'] == 'text' %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    for content in (parts, "def main():"):
        ids = encode_chat(tokenizer, [{"role": "user", "content": content}])
        assert ids == tokenizer.encode("user def main():")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ('{"line": 3}', {"line": 3}),
        ({"line": 3}, {"line": 3}),
        ("", {}),
        ("{line", "{line"),
        ("3", "3"),
    ],
)
def test_the_template_gets_the_arguments_of_earlier_calls_as_values(written, expected):
    call = {"type": "function", "id": "a", "function": {"name": "find", "arguments": written}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    (found,) = read(Chat, json.dumps({"messages": [message]}).encode()).messages
    function = call["function"] | {"arguments": expected}
    assert found == message | {"tool_calls": [call | {"function": function}]}


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


def ask(url, prompt="def main():", **options):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=SECONDS) as other:
        return complete(other, prompt, **options)


def test_a_stream_alone_goes_on_in_the_batch_when_others_come(client, url, steps):
    """Its text is the same, and the others need not wait for its end."""
    options = {"model": "tiny", "prompt": "def main():", "max_tokens": 200}
    options |= {"temperature": 1.0, "seed": 5}
    alone = client.completions.create(**options).choices[0].text
    stream = client.completions.create(stream=True, **options)
    text = next(iter(stream)).choices[0].text
    before = len(steps)
    assert ask(url, "return the name", max_tokens=2).choices[0].text
    assert len(steps) - before < 100  # of the 200 that the stream takes
    text += "".join(chunk.choices[0].text for chunk in stream)
    assert text == alone


def test_many_choices_and_prompts(client):
    one = complete(client, "return the name").choices[0].text
    ids = [40, 41, 42]
    answer = complete(client, ["def main():", "return the name"], n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices[2:]] == [one, one]
    assert answer.usage.completion_tokens == 48
    by_ids = complete(client, [ids, ids[:2]])
    assert by_ids.choices[0].text == complete(client, ids).choices[0].text
    drawn = complete(client, n=3, temperature=1.5, seed=3).choices
    assert len({choice.text for choice in drawn}) == 3
    assert drawn[1].text == complete(client, temperature=1.5, seed=4).choices[0].text
    texts = ["", "", ""]
    for chunk in complete(client, n=3, temperature=1.5, seed=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in drawn]
    chat = client.chat.completions.create(model="tiny", messages=USER, n=2, max_tokens=3)
    assert len(chat.choices) == 2


def test_log_probabilities(client, directory):
    model, tokenizer = load(directory)
    ids = tokenizer("def main():").input_ids
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
    found = complete(client, logprobs=3).choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == 12
    assert found.token_logprobs[0] == pytest.approx(float(logs.max()), abs=1e-4)
    top = sorted(found.top_logprobs[0].values(), reverse=True)
    assert top == pytest.approx(logs.topk(3).values.tolist(), abs=1e-4)
    options = {"model": "tiny", "messages": USER, "max_tokens": 4, "logprobs": True}
    chat = client.chat.completions.create(top_logprobs=2, **options).choices[0]
    assert len(chat.logprobs.content) == 4 and len(chat.logprobs.content[0].top_logprobs) == 2
    best = chat.logprobs.content[0].top_logprobs[0]
    assert chat.logprobs.content[0].logprob == best.logprob
    pieces = list(client.chat.completions.create(stream=True, **options))
    assert sum(len(p.choices[0].logprobs.content) for p in pieces if p.choices[0].logprobs) == 4


def test_bytes_of_half_a_character_are_not_made_up(client, tokenizer, monkeypatch):
    script = tokenizer.encode("aé")
    let_say(monkeypatch, script * 2)
    options = {"model": "tiny", "messages": USER, "max_tokens": len(script), "logprobs": True}
    choice = client.chat.completions.create(**options).choices[0]
    assert choice.message.content == "aé"
    assert [one.bytes for one in choice.logprobs.content] == [[97], None, None]
    monkeypatch.undo()


def test_bias_and_penalties(client):
    ids = complete(client, logit_bias={"70": 100}, logprobs=0).choices[0].logprobs.tokens
    assert len(set(ids)) == 1
    spread = complete(client, logit_bias={"70": 100}, frequency_penalty=2, presence_penalty=2)
    assert spread.choices[0].text  # 12 tokens at 2 each are not enough against 100
    plain = complete(client, logprobs=0)
    once = complete(client, logprobs=0, presence_penalty=2, frequency_penalty=2)
    repeated = len(plain.choices[0].logprobs.tokens) - len(set(plain.choices[0].logprobs.tokens))
    after = len(once.choices[0].logprobs.tokens) - len(set(once.choices[0].logprobs.tokens))
    assert after <= repeated


def test_echo_and_stop(client):
    text = complete(client).choices[0].text
    assert complete(client, echo=True).choices[0].text == "def main():" + text
    stop = text[4:6]
    cut = complete(client, stop=["no such text", stop]).choices[0]
    assert cut.text == text[: text.index(stop)] and cut.finish_reason == "stop"
    assert complete(client, stop=[]).choices[0].text == text  # some clients say none so
    streamed = list(complete(client, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == cut.text
    assert streamed[-1].choices[0].finish_reason == "stop"


def test_usage_in_a_stream(client):
    *_, last = complete(client, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage.completion_tokens == 12


def test_one_model_by_its_name(client):
    assert client.models.retrieve("tiny").id == "tiny"
    refused(lambda: client.models.retrieve("gpt-7"), 400, "not 'gpt-7'")


def test_metrics(client, url):
    complete(client)
    text = requests.get(f"{url}/metrics", timeout=SECONDS).text
    for name in (
        'sparse_bitnet_requests_total{route="completions"}',
        "sparse_bitnet_tokens_total",
        "sparse_bitnet_time_to_first_token_seconds_count",
        "sparse_bitnet_time_per_token_seconds_bucket",
        "sparse_bitnet_running 0",
        "sparse_bitnet_cache_use 0",
    ):
        assert name in text


def test_a_full_queue(directory, steps):
    with running(directory, max_running=1, max_waiting=1) as url:
        body = {"model": "tiny", "prompt": "def main():", "max_tokens": 400, "stream": True}
        address = f"{url}/v1/completions"
        held = [requests.post(address, json=body, stream=True, timeout=SECONDS) for _ in range(2)]
        answer = requests.post(address, json=body | {"stream": False}, timeout=SECONDS)
        assert answer.status_code == 429 and answer.headers["Retry-After"] == "1"
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        for one in held:
            one.close()
        for _ in range(100):
            answer = requests.post(address, json=body | {"stream": False, "max_tokens": 2})
            if answer.status_code == 200:
                break
            time.sleep(0.05)
        assert answer.status_code == 200


def test_more_sequences_than_the_cache_holds(directory):
    """They are computed one after the other or again, and each as if it were alone."""
    with running(directory, cache_tokens=256) as url:
        with ThreadPoolExecutor(8) as pool:
            texts = set(
                pool.map(
                    lambda _: requests.post(
                        f"{url}/v1/completions",
                        json={"prompt": "def main():", "max_tokens": 100},
                        timeout=SECONDS,
                    ).json()["choices"][0]["text"],
                    range(8),
                )
            )
        assert len(texts) == 1
        too_long = requests.post(f"{url}/v1/completions", json={"prompt": "return the " * 200})
        assert too_long.status_code == 400  # of 204 tokens: transformers keeps some free


def test_pages_that_may_use_it(directory):
    with running(directory, cors_origins=("http://page.example",)) as url:
        headers = {"Origin": "http://page.example", "Access-Control-Request-Method": "POST"}
        answer = requests.options(f"{url}/v1/completions", headers=headers, timeout=SECONDS)
        assert answer.headers["Access-Control-Allow-Origin"] == "http://page.example"
        headers["Origin"] = "http://evil.example"
        answer = requests.options(f"{url}/v1/completions", headers=headers, timeout=SECONDS)
        assert "Access-Control-Allow-Origin" not in answer.headers


def test_tools_are_refused_where_the_template_has_no_form_for_them(client):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    refused(
        lambda: client.chat.completions.create(model="tiny", messages=USER, tools=tools),
        400,
        "chat template defines no form of tool calls",
    )


CALL = '<tool_call>\n{"name": "find", "arguments": {"path": "a.py", "line": 3}}\n</tool_call>'
FIND = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}


@pytest.fixture
def calling(directory, tokenizer, tmp_path, monkeypatch):
    """A client of a server whose template knows tools, and whose model says ``CALL``."""
    shutil.copytree(directory, tmp_path / "tiny")
    template = "{% if tools %}{{ tools | tojson }} as <tool_call>{% endif %}" + TEMPLATE
    (tmp_path / "tiny" / "chat_template.jinja").write_text(template)
    let_say(monkeypatch, tokenizer.encode(CALL))
    with running(tmp_path / "tiny") as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=SECONDS, max_retries=0)


def ask_with_tools(client, tokenizer, **options):
    options |= {"max_tokens": len(tokenizer.encode(CALL)), "model": "tiny", "messages": USER}
    return client.chat.completions.create(**options)


def test_a_tool_call(calling, tokenizer):
    answer = ask_with_tools(calling, tokenizer, tools=[FIND])
    (choice,) = answer.choices
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and not choice.message.content
    assert (call.type, call.function.name) == ("function", "find")
    assert json.loads(call.function.arguments) == {"path": "a.py", "line": 3}
    plain = ask_with_tools(calling, tokenizer)
    assert plain.choices[0].message.content == CALL and not plain.choices[0].message.tool_calls
    assert answer.usage.prompt_tokens > plain.usage.prompt_tokens  # the model was told of them


def test_a_tool_call_streams(calling, tokenizer):
    deltas = [
        chunk.choices[0] for chunk in ask_with_tools(calling, tokenizer, tools=[FIND], stream=True)
    ]
    (call,) = [call for choice in deltas for call in choice.delta.tool_calls or ()]
    assert (call.index, call.function.name, deltas[-1].finish_reason) == (0, "find", "tool_calls")
    assert json.loads(call.function.arguments) == {"path": "a.py", "line": 3}
    assert not "".join(choice.delta.content or "" for choice in deltas)


def test_log_probabilities_stream_beside_tools(calling, tokenizer):
    options = {"tools": [FIND], "logprobs": True}
    (whole,) = ask_with_tools(calling, tokenizer, **options).choices
    chunks = ask_with_tools(calling, tokenizer, stream=True, **options)
    found = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
    assert [one for part in found for one in part.content] == whole.logprobs.content != []


def test_tools_that_may_not_be_called(calling, tokenizer):
    answer = ask_with_tools(calling, tokenizer, tools=[FIND], tool_choice="none")
    assert answer.choices[0].message.content == CALL


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["file", "line"]},
        "number": {"type": "integer", "minimum": 10, "maximum": 99},
    },
    "required": ["name", "number"],
    "additionalProperties": False,
}


def in_json(client, stream=False, **options):
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}
    options = {"response_format": form, "max_tokens": 100, "temperature": 1} | options
    return client.chat.completions.create(model="tiny", messages=USER, stream=stream, **options)


@pytest.mark.parametrize("seed", range(4))
def test_an_answer_of_a_schema(client, seed):
    """A model that knows nothing of JSON, and draws."""
    (choice,) = in_json(client, seed=seed).choices
    found = json.loads(choice.message.content)
    assert found.keys() == {"name", "number"} and choice.finish_reason == "stop"
    assert found["name"] in ("file", "line") and 10 <= found["number"] <= 99


def test_an_answer_of_a_schema_streams_and_has_choices(client):
    text = {0: "", 1: ""}
    for chunk in in_json(client, stream=True, n=2, seed=1):
        for choice in chunk.choices:
            text[choice.index] += choice.delta.content or ""
    assert [json.loads(text[0]), json.loads(text[1])] == [
        json.loads(choice.message.content) for choice in in_json(client, n=2, seed=1).choices
    ]
    assert text[0] != text[1]


def test_an_answer_of_a_schema_beside_others(client):
    with ThreadPoolExecutor(4) as pool:
        plain = pool.submit(complete, client, max_tokens=200)
        answers = [pool.submit(in_json, client, seed=seed) for seed in range(3)]
        for answer in answers:
            json.loads(answer.result().choices[0].message.content)
        assert plain.result().choices[0].text == complete(client, max_tokens=200).choices[0].text


def test_any_object(client):
    answer = complete(
        client,
        prompt="{",
        extra_body={"response_format": {"type": "json_object"}},
        max_tokens=500,
        temperature=1,
        seed=3,
        logit_bias={str(token): 20 for token in (93,)},  # }
    )
    assert isinstance(json.loads(answer.choices[0].text), dict)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "nonsense"}, "Invalid type"),
        ({"type": "string", "pattern": "("}, "regex parse error"),
        ({"$ref": "http://localhost/x"}, "not present"),
        ({"required": ["a"], "additionalProperties": False, "type": "object"}, "nsatisfiable"),
    ],
)
def test_schemas_that_cannot_be_followed(client, schema, message):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    refused(lambda: in_json(client, response_format=form), 400, message)


@pytest.mark.parametrize(
    "form",
    [
        {"type": "xml"},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": "x"}},
        {"type": "json_schema", "json_schema": {"schema": {}, "other": 1}},
    ],
)
def test_forms_that_do_not_exist(client, form):
    refused(lambda: in_json(client, response_format=form), 400, "response_format")


def test_json_without_the_library(client, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    refused(lambda: in_json(client), 400, "sparse-bitnet[json]")


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
    refused(lambda: complete(client, extra_body={"colour": "red"}), 400, "colour is unknown")


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
        ({"temperature": "hot"}, "temperature is 'hot': it must be a valid number"),
        ({"temperature": -1}, "temperature is -1: it must be greater than or equal to 0"),
        ({"temperature": True}, "temperature is True"),
        ({"top_p": 0}, "top_p is 0"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": 10**30}, "seed is 1000000"),
        ({"stop": ""}, "stop.0 is '': String should have at least 1 character"),
        ({"stop": [1]}, "stop.0 is 1: it must be a valid string"),
        ({"extra_body": {"stop": 5}}, "stop: it has to be text or a list of texts, not 5"),
        ({"extra_body": {"stream_options": {"foo": 1}}}, "stream_options.foo is unknown; choose"),
        ({"extra_body": {"stream_options": {"include_usage": "x"}}}, "include_usage is 'x'"),
        ({"stop": "x" * 129}, "String should have at most 128 characters"),
        ({"stop": ["x"] * 17}, "List should have at most 16 items"),
        ({"n": 17}, "n is 17: it must be less than or equal to 16"),
        ({"logprobs": 6}, "logprobs is 6"),
        ({"logprobs": 1, "echo": True}, "echo with logprobs"),
        ({"best_of": 2}, "best_of is 2: it must be 1"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"7": 101}}, "logit_bias.7 is 101"),
        ({"logit_bias": {"70000": 1}}, "logit_bias: a token id is beyond the vocabulary"),
        ({"suffix": "x"}, "suffix is 'x'"),
        ({"extra_body": {"generation_config": "{}"}}, "generation_config is unknown"),
        ({"extra_body": {"stream": "yes"}}, "stream is 'yes'"),
        ({"extra_body": {"max_tokens": 0}}, "max_tokens is 0"),
        ({"extra_body": {"prompt": ["a", 1]}}, "prompt: it has to be text"),
        ({"extra_body": {"prompt": []}}, "prompt: it has to be text"),
        ({"extra_body": {"prompt": [[]]}}, "prompt: it has to be text"),
        ({"extra_body": {"prompt": [70000]}}, "prompt: token id 70000 is beyond"),
        ({"extra_body": {"prompt": None}}, "prompt: it has to be text"),
        ({"extra_body": {"model": "gpt-7"}}, "this server has the model 'tiny', not 'gpt-7'"),
    ],
)
def test_fields_that_make_no_sense(client, options, message):
    refused(lambda: complete(client, **options), 400, message)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is []"),
        ("hello", "messages is 'hello'"),
        (["hello"], "messages.0 is 'hello': it must be an object"),
        ([{"content": "x"}], "messages.0.role is missing"),
        ([{"role": "king", "content": "x"}], "messages.0.role is 'king'"),
        ([{"role": "user"}], "messages.0: its content is missing"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            "messages.0.content.0.type is 'image_url': it must be 'text'; "
            "messages.0.content.0.text is missing",
        ),
        (
            [*USER, {"role": "user", "content": 5}],
            "messages.1.content: it has to be text or a list of parts, not 5",
        ),
        ([{"role": "tool", "content": "x"}], "the chat template says: no tools here"),
    ],
)
def test_messages_that_make_no_sense(client, messages, message):
    refused(lambda: client.chat.completions.create(model="tiny", messages=messages), 400, message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"response_format": {"type": "text", "foo": 1}},
            "response_format.foo is unknown; choose among type, json_schema",
        ),
        ({"tools": [1]}, "tools.0 is 1: it must be an object"),
    ],
)
def test_fields_of_a_chat_that_make_no_sense(client, options, message):
    create = client.chat.completions.create
    body = refused(lambda: create(model="tiny", messages=USER, extra_body=options), 400, message)
    assert body["message"] == message


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "Invalid JSON"),
        (b"{}", "prompt is missing"),
        (b"{", "Invalid JSON"),
        (b'{"model": "tiny", "prompt": }', "Invalid JSON: expected value at line 1 column 29"),
        (b"[]", "it must be an object"),
        (b"\xff\xfe", ""),
        (b"[" * 100_000, ""),
        (b'{"prompt": "\\ud800"}', "hex escape"),
        (b'{"prompt": "x", "stop": ["a", "\\udfff"]}', "hex escape"),
        (b'{"prompt": "x", "model": "\\udfff"}', "hex escape"),
        (b'{"prompt": "x", "user": {"a": ["\\ud800"]}}', "hex escape"),
        (b'{"prompt": "x", "temperature": 1e-40}', "1e-40 is neither 0 nor"),
        (b'{"prompt": "x", "temperature": NaN}', "temperature is nan"),
        (b'{"prompt": "x", "temperature": 1e999}', "temperature is inf"),
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


@pytest.mark.parametrize(
    "name", ["chat_template", "tokenize", "return_tensors", "tools", "messages", "tokenizer"]
)
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
    known = sorted({*get_type_hints(Chat), *get_type_hints(Completion)})
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
        assert answer.status_code in {200, 400}, (data, answer.text)
        assert "error" not in answer.text or answer.status_code != 200, (data, answer.text)


def test_other_routes_and_methods(client, url):
    for path in ("/load_model", "/reset", "/v1/responses", "/v1/audio/transcriptions"):
        answer = requests.post(f"{url}{path}", json={"model": "/etc"})
        assert answer.status_code == 404 and path in answer.json()["error"]["message"]
    answer = requests.get(f"{url}/v1/completions")
    assert answer.status_code == 405 and answer.json()["error"]["message"]
    assert requests.get(f"{url}/health").json() == {"status": "ok"}


def test_a_failure_inside_is_status_500_and_no_more(client, monkeypatch):
    from sparse_bitnet.modeling import DecoderForCausalLM

    def broken(*_, **__):
        raise RuntimeError("the device is on fire")

    with monkeypatch.context() as patch:
        patch.setattr(DecoderForCausalLM, "forward", broken)
        body = refused(lambda: complete(client), 500, "RuntimeError: the device is on fire")
        assert body["type"] == "server_error"
        with pytest.raises(openai.APIError) as caught:
            list(complete(client, stream=True))
        assert caught.value.body["message"] == "RuntimeError: the device is on fire"


def test_a_failure_in_the_batch_fails_what_is_there_and_nothing_after(client, monkeypatch):
    forward = DecoderForCausalLM.forward

    def breaks(model, *arguments, **options):
        if "past_key_values" not in options:  # the batch has a cache of its own
            raise RuntimeError("the device is on fire")
        return forward(model, *arguments, **options)

    with monkeypatch.context() as patch, ThreadPoolExecutor(4) as pool:
        patch.setattr(DecoderForCausalLM, "forward", breaks)
        answers = [pool.submit(refused, lambda: complete(client, n=2), 500, "") for _ in range(4)]
        for answer in answers:
            answer.result()
    for _ in range(50):  # until it has started again
        try:
            assert complete(client, n=2).choices[1].text
            break
        except openai.InternalServerError:
            time.sleep(0.1)
    else:
        raise AssertionError("the engine did not start again")


def test_without_a_chat_template(pristine):
    with running(pristine / "two-bit") as url:
        address = f"{url}/v1/chat/completions"
        answer = requests.post(address, json={"messages": USER}, timeout=SECONDS)
    assert answer.status_code == 400
    assert "no chat template" in json.dumps(answer.json())


def test_refuses_to_start(pristine, monkeypatch):
    with pytest.raises(ConfigError, match="serve: --port 70000 is out of range"):
        serving.serve(pristine / "two-bit", server=serving.Options(port=70000))
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"serve: localhost:{port}: Address already in use"):
            serving.serve(pristine / "two-bit", server=serving.Options(port=port))
    with pytest.raises(ConfigError, match=r"serve: 192.0.2.1:0: Cannot assign requested address"):
        serving.serve(pristine / "two-bit", server=serving.Options(host="192.0.2.1", port=0))
    with pytest.raises(ConfigError, match=r"serve: --host '\.' is no address of this machine"):
        serving.serve(pristine / "two-bit", server=serving.Options(host="."))
    missing = {"find_spec": lambda _: None, "version": lambda _: "5.17.0"}
    for name, answer in missing.items():
        with monkeypatch.context() as patch:
            patch.setattr(serving, name, answer)
            with pytest.raises(MissingExtraError, match=r"pip install 'sparse-bitnet\[serve\]'"):
                serving.serve(pristine / "two-bit")


@pytest.mark.slow
def test_memory_and_file_handles_stay(directory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "sparse_bitnet", "serve", str(directory), "--port", str(port)]
    process = subprocess.Popen([sys.executable, *command])
    address = f"http://localhost:{port}/v1/completions"
    body = {"prompt": "def main():", "max_tokens": 400}

    def use():
        entry = Path(f"/proc/{process.pid}")
        pages = int((entry / "statm").read_text().split()[1])
        return pages * resource.getpagesize() >> 20, len(list((entry / "fd").iterdir()))

    def requests_of_both_kinds(count):
        for _ in range(count):
            with requests.post(address, json=body | {"stream": True}, stream=True) as stream:
                next(stream.iter_lines())  # and no more of it
        short = body | {"max_tokens": 12}
        with ThreadPoolExecutor(8) as pool:
            answers = pool.map(lambda _: requests.post(address, json=short), range(2 * count))
            assert {answer.status_code for answer in answers} == {200}

    try:
        for _ in range(SECONDS):
            with suppress(requests.ConnectionError):
                requests.get(f"http://localhost:{port}/health")
                break
            time.sleep(1)
        requests_of_both_kinds(50)
        memory, handles = use()
        requests_of_both_kinds(200)
        time.sleep(1)
        after, handles_after = use()
    finally:
        process.terminate()
        process.wait(timeout=SECONDS)
    print(f"{memory} MiB and {handles} handles before, {after} and {handles_after} after")
    assert after - memory < 16 and handles_after <= handles + 1


@pytest.mark.slow  # seconds of imports
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -15)])
def test_the_verb_serves_until_it_is_interrupted(long_directory, number, status):
    directory = long_directory
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
                model="it", prompt="def", max_tokens=400_000, stream=True
            )
            next(iter(stream))
            process.send_signal(number)
            if number == signal.SIGINT:
                time.sleep(0.5)
                process.send_signal(number)  # impatient: it ends no sooner, and no less cleanly
            else:
                with pytest.raises(openai.APIError, match="the server is shutting down"):
                    list(stream)
            said = process.communicate(timeout=SECONDS)[0]
    finally:
        process.kill()
    assert process.returncode == status and "Traceback" not in said, said
    beginning, *rest = said.splitlines()
    assert beginning.startswith("serving it at http://localhost")
    assert rest == (["interrupted"] if number == signal.SIGINT else [])
