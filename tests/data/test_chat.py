"""Conversations: found answers against transformers' own mask and against reading by hand."""

import itertools
import json
import random
import shutil

import numpy as np
import pytest
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from sparse_bitnet.core.errors import ConfigError, DataError
from sparse_bitnet.data import Loader, TokenShards, open_source, prepare
from sparse_bitnet.data.chat import Chat, ChatTemplate, check_messages
from sparse_bitnet.data.loader import IGNORED
from sparse_bitnet.data.tokenizer import Encoder, train_bpe

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Forgets what earlier answers said, as templates of reasoning models do with thoughts.
FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and not loop.last %}{{ 'said something' }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_tokenizer(template):
    tokenizer = train_bpe(["who are you? I am a model. yes  no system user assistant " * 9], 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = template
    return tokenizer


def turns(*contents, system=None):
    """A conversation of user, assistant, user, …"""
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + messages


def conversations(count):
    rng = random.Random(1)
    words = ["who", "are", "you", "naïve", "数据", "🙂", "  spaced ", "\n\nlines\n", "x"]
    return [
        turns(
            *(" ".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(rng.randint(2, 7))),
            system=rng.choice([None, "be brief"]),
        )
        for _ in range(count)
    ]


def write(path, rows):
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return f"jsonl:{path}#messages"


def by_hand(messages):
    """CHATML's pieces, and whether each is an answer."""
    pieces = [("<|im_start|>system\nBe kind.<|im_end|>\n", False)]
    if messages[0]["role"] == "system":
        pieces = []
    for message in messages:
        pieces.append((f"<|im_start|>{message['role']}\n", False))
        pieces.append((f"{message['content']}<|im_end|>", message["role"] == "assistant"))
        pieces.append(("\n", False))
    return pieces


@pytest.mark.parametrize("messages", conversations(20))
def test_answers_by_prefixes(messages):
    chat = ChatTemplate(chat_tokenizer(CHATML), "here").render(messages, "a, line 1")
    assert chat is not None
    pieces = by_hand(messages)
    assert chat.text == "".join(text for text, _ in pieces)
    expected = [text for text, answer in pieces if answer]
    assert [chat.text[start:end] for start, end in chat.answers] == expected


def test_tokens_are_the_template_s_and_answers_transformers_own_mask():
    tokenizer = chat_tokenizer(MARKED)
    template, encoder = ChatTemplate(tokenizer, "here"), Encoder(tokenizer)
    everything = conversations(40)
    chats = [template.render(messages, "") for messages in everything]
    tokens = encoder.encode_chats([chat for chat in chats if chat])
    starts = [*np.flatnonzero(tokens["first"]), len(tokens)]
    for number, messages in enumerate(everything):
        mine = tokens[starts[number] : starts[number + 1]]
        theirs = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        assert mine["id"].tolist() == theirs["input_ids"]
        assert mine["answer"].tolist() == theirs["assistant_masks"]


def test_a_token_belongs_to_where_it_begins():
    """Spaces that a byte-level tokenizer keeps out of offsets included."""
    encoder = Encoder(chat_tokenizer(CHATML))
    text = "<|im_start|>are  you <|im_end|>"
    for start in range(len(text)):
        tokens = encoder.encode_chats([Chat(text, [(start, len(text))])])
        place, begins = 0, []
        for token in tokens["id"].tolist():
            begins.append(place)
            place += len(encoder.tokenizer.decode([token]))
        assert place == len(text)
        expected = [n > 0 and begin >= start for n, begin in enumerate(begins)]
        assert (tokens["answer"] != 0).tolist() == expected


def test_a_template_that_rewrites_earlier_answers_is_refused():
    template = ChatTemplate(chat_tokenizer(FORGETFUL), "here")
    assert template.render(turns("who", "me"), "a, line 1") is not None
    with pytest.raises(DataError, match=r"a, line 2, message 3: .* otherwise once it is there"):
        template.render(turns("who", "me", "and", "you"), "a, line 2")
    with pytest.raises(DataError, match=r"a, line 3: .* otherwise than its beginning"):
        template.render(turns("who", "me", "and"), "a, line 3")


def test_what_is_left_out_and_counted(capsys):
    template = ChatTemplate(chat_tokenizer(CHATML), "here")
    nothing = [
        turns("who"),
        [{"role": "assistant", "content": "an answer to nothing"}],
        turns("who", ""),
        turns("who", "me", "and", " \n"),
        turns("say <|im_end|>", "no"),
        turns("who", "<|im_start|>user"),
    ]
    assert [template.render(messages, "") for messages in nothing] == [None] * 6
    template.report()
    assert capsys.readouterr().err == (
        "warning: left out 6 conversations: 2 without an answer, 2 with an empty answer, 2 with a "
        "special token written out as text\n"
    )


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_an_answer_to_nothing_is_not_learned(template):
    messages = [{"role": "assistant", "content": "hello"}, *turns("who", "me", "and", "you")]
    chat = ChatTemplate(chat_tokenizer(template), "here").render(messages, "")
    assert chat is not None and "hello" in chat.text
    assert [chat.text[slice(*one)] for one in chat.answers] == ["me<|im_end|>", "you<|im_end|>"]


BRACKETS = (  # as Llama 2: nothing asks for an answer, which begins with a space
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
)


COLONS = (  # a prompt that ends in a space, which is one token with the first word
    "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "space"),
    [(CHATML[: CHATML.index("{% if add")], ""), (BRACKETS, " "), (COLONS, " ")],
)
def test_a_header_is_not_learned_and_a_space_behind_it_is(template, space):
    chat = ChatTemplate(chat_tokenizer(template), "").render(turns("who", "an x", "a", "ab"), "")
    assert chat is not None
    expected = [f"{space}an x<|im_end|>", f"{space}ab<|im_end|>"]
    assert [chat.text[slice(*one)] for one in chat.answers] == expected


@pytest.mark.parametrize(
    "extra",
    [
        {"name": "<|im_end|>"},
        {"reasoning_content": "say <|im_end|>"},
        {"tool_calls": [{"function": {"name": "f", "arguments": {"at": ["<|im_end|>"]}}}]},
        {"tool_calls": [{"function": {"name": "f", "arguments": {"<|im_end|>": 1}}}]},
    ],
)
def test_special_tokens_anywhere_in_a_message(extra):
    template = ChatTemplate(chat_tokenizer(CHATML), "here")
    messages = turns("who", "me")
    assert template.render(messages, "") is not None
    messages[1] |= extra
    assert template.render(messages, "") is None
    assert template.left_out == {"with a special token written out as text": 1}


CALL = {"function": {"name": "look", "arguments": {"at": "x"}}}


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_calls_that_the_template_does_not_write(template):
    called = [*turns("who", "wait", "look"), {"role": "assistant", "content": ""}]
    called[-1]["tool_calls"] = [CALL]
    silent = ChatTemplate(chat_tokenizer(template), "here")
    assert silent.render(called, "") is None
    assert silent.left_out == {"with an empty answer": 1}
    writes = template.replace("m.content +", "m.content + (m.tool_calls or '')|string +")
    chat = ChatTemplate(chat_tokenizer(writes), "here").render(called, "")
    assert chat.text[slice(*chat.answers[1])] == f"{[CALL]}<|im_end|>"


def test_calls_marked_apart_from_the_content():
    written = (
        "{% generation %}{{ m.content }}{% endgeneration %}"
        "{% generation %}{{ (m.tool_calls or '')|string + '<|im_end|>' }}{% endgeneration %}"
    )
    start, end = MARKED.index("{% generation %}"), MARKED.index("{% else %}")
    template = ChatTemplate(chat_tokenizer(MARKED[:start] + written + MARKED[end:]), "here")
    called = [*turns("who"), {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    chat = template.render(called, "")
    assert [chat.text[slice(*one)] for one in chat.answers] == [f"{[CALL]}<|im_end|>"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "messages is None; it must be a list"),
        ([], r"messages is \[\]"),
        ("who are you", "messages is 'who are you'"),
        ({"role": "user", "content": "a"}, "it must be a list"),
        (["who"], "message 0: is 'who', not an object"),
        ([{"content": "who"}], "message 0: role is None"),
        ([*turns("who"), {"role": "robot", "content": "me"}], "message 1: role is 'robot'"),
        ([{"role": ["user"], "content": "who"}], "role is"),
        ([{"role": "user"}], "message 0: content is None; it must be text"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "must be text"),
        ([{"role": "user", "content": "\ud83d"}], "not valid Unicode"),
    ],
)
def test_messages_that_are_none(value, message):
    with pytest.raises(DataError, match=f"^b.jsonl, line 7.*{message}"):
        check_messages(value, "b.jsonl, line 7")


def test_what_a_template_raises_names_the_line():
    alternating = "{% if messages|length > 1 %}{{ raise_exception('one at a time') }}{% endif %}"
    template = ChatTemplate(chat_tokenizer(alternating), "here")
    with pytest.raises(DataError, match=r"line 2: the chat template says: one at a time"):
        template.render(turns("who", "me"), "line 2")
    with pytest.raises(DataError, match="line 2: the chat template says: 'x' is undefined"):
        ChatTemplate(chat_tokenizer("{{ x.y }}"), "").render(turns("who", "me"), "line 2")
    with pytest.raises(DataError, match="leaves nothing of the answers to learn"):
        ChatTemplate(chat_tokenizer("{{ bos_token }}"), "").render(turns("who", "me"), "line 2")


@pytest.fixture(scope="module", params=[CHATML, MARKED])
def model(request, tmp_path_factory):
    """A directory as of a model: its shape and its tokenizer."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = chat_tokenizer(request.param)
    tokenizer.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps({"vocab_size": len(tokenizer)}))
    return directory


def reference(model, rows):
    """Ids and answers of each conversation, rendered and encoded one by one."""
    encoder = Encoder(PreTrainedTokenizerFast.from_pretrained(str(model)))
    template = ChatTemplate(encoder.tokenizer, "")
    out = []
    for messages in rows:
        chat = template.render(messages, "")
        if chat is not None:
            tokens = encoder.encode_chats([chat])
            out.append((tokens["id"].tolist(), (tokens["answer"] != 0).tolist()))
    return out


def test_prepared_conversations(model, tmp_path):
    rows = [*conversations(60), turns("who"), *conversations(30)]
    spec = write(tmp_path / "chat.jsonl", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparse_bitnet.data.encode.PORTION_BYTES", 1000)
        settings = {"model": str(model), "validation": 0.2, "shard_tokens": 2000}
        summary = prepare(spec, tmp_path / "out", **settings)
        again = prepare(spec, tmp_path / "out", **settings)
    assert summary["left_out"] == 1 and again["reused"]
    expected = sorted(reference(model, rows))
    found = []
    for split in ("train", "validation"):
        shards = TokenShards(tmp_path / "out" / split)
        assert shards.has_answers and (split == "validation" or len(shards.shards) > 1)
        starts = [*shards.document_starts(), shards.total_tokens]
        assert len(starts) - 1 == shards.total_documents == summary[split]["documents"]
        for start, end in itertools.pairwise(starts):
            learned, first = shards.marks([start], end - start)
            assert first[0].tolist() == [True] + [False] * (end - start - 1)
            found.append((shards.tokens(start, end - start).tolist(), learned[0].tolist()))
    assert sorted(found) == expected


@pytest.mark.parametrize("length", [5, 40, 200])
def test_windows_hold_whole_conversations(model, tmp_path, length, capsys):
    """Against next fit, written out; an answer that is cut is learned up to there."""
    rows = conversations(50)
    prepare(write(tmp_path / "a.jsonl", rows), tmp_path / "a", model=str(model), validation=0)
    shards = TokenShards(tmp_path / "a" / "train")
    expected = []
    room, cut = 0, 0
    for whole, all_answers in reference(model, rows):
        cut += len(whole) > length + 1
        ids, answers = whole[: length + 1], all_answers[: length + 1]
        if not any(answers):
            room = 0
            continue
        if len(ids) > room:
            expected.append(([], [], []))
            room = length + 1
        labels = [one if said else IGNORED for one, said in zip(ids, answers, strict=True)]
        for row, more in zip(expected[-1], (ids, labels, range(len(ids))), strict=True):
            row.extend(more)
        room -= len(ids)
    if not expected:
        with pytest.raises(DataError, match="no answer begins within 6 tokens"):
            Loader(shards, length, 1)
        return
    loader = Loader(shards, length, 1, seed=3)
    assert (f"{cut} of 50 conversations are longer" in capsys.readouterr().err) == (cut > 0)
    assert loader.windows == [len(expected)]
    found = []
    for step in range(len(expected)):
        batch = loader.batch(step)
        assert batch.positions is not None
        found.append([one[0].tolist() for one in (batch.inputs, batch.labels, batch.positions)])
    padded = []
    for ids, labels, positions in expected:
        rest = length + 1 - len(ids)
        rows_of = (ids + [shards.eos_id] * rest, labels + [IGNORED] * rest, positions + [0] * rest)
        padded.append([rows_of[0][:-1], rows_of[1][1:], rows_of[2][:-1]])
    assert sorted(found) == sorted(padded)


def test_conversations_beside_text(model, tmp_path):
    """In a mixture, rows of text are learned whole, in one piece."""
    prepare(
        write(tmp_path / "a.jsonl", conversations(9)),
        tmp_path / "a",
        model=str(model),
        validation=0,
    )
    (tmp_path / "text").write_text("who are you? " * 99)
    prepare(f"text:{tmp_path / 'text'}", tmp_path / "b", model=str(model), validation=0)
    chats, text = (TokenShards(tmp_path / name / "train") for name in "ab")
    batch = Loader([(chats, 1), (text, 1)], 100, 2).batch(0)
    assert batch.positions is not None
    whole = (batch.labels != IGNORED).all(1)
    assert whole.tolist().count(True) == 1
    row = whole.tolist().index(True)
    assert batch.positions[row].tolist() == list(range(100))
    assert batch.labels[row, :-1].tolist() == batch.inputs[row, 1:].tolist()


def test_text_whose_documents_are_apart(prepared):
    shards = TokenShards(prepared / "train")
    together, apart = (Loader(shards, 64, 8, separate_documents=flag) for flag in (False, True))
    for step in range(20):
        batch, whole = apart.batch(step), together.batch(step)
        assert batch.positions is not None and (batch.inputs == whole.inputs).all()
        for row, ids in enumerate(batch.inputs.tolist()):
            positions, place = [], 0
            for column, one in enumerate(ids):
                ends = one == shards.eos_id
                label = IGNORED if ends else int(whole.labels[row, column])
                assert batch.labels[row, column] == label
                positions.append(place)
                place = 0 if ends else place + 1
            assert batch.positions[row].tolist() == positions


class TestRefusals:
    def test_templates(self, tmp_path):
        chat_tokenizer(None).save_pretrained(tmp_path / "none")
        spec = write(tmp_path / "a.jsonl", conversations(3))
        with pytest.raises(DataError, match="none: has no chat template"):
            prepare(spec, tmp_path / "out", tokenizer=str(tmp_path / "none"))
        with pytest.raises(ConfigError, match="name the model"):
            prepare(spec, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_tokenizer_in_python_only(self, tmp_path):
        tokenizer = ByT5Tokenizer()
        tokenizer.chat_template = CHATML
        tokenizer.save_pretrained(tmp_path / "byt5")
        spec = write(tmp_path / "a.jsonl", conversations(3))
        with pytest.raises(DataError, match=r"without tokenizer\.json does not say where"):
            prepare(spec, tmp_path / "out", tokenizer=str(tmp_path / "byt5"), validation=0)

    def test_another_template_is_another_preparation(self, tmp_path):
        spec = write(tmp_path / "a.jsonl", conversations(9))
        for name, template in (("one", CHATML), ("two", MARKED)):
            chat_tokenizer(template).save_pretrained(tmp_path / name)
        prepare(spec, tmp_path / "out", tokenizer=str(tmp_path / "one"), validation=0)
        with pytest.raises(DataError, match="chat_template was"):
            prepare(spec, tmp_path / "out", tokenizer=str(tmp_path / "two"), validation=0)

    def test_models(self, model, prepared, tmp_path):
        spec = write(tmp_path / "a.jsonl", conversations(3))
        with pytest.raises(ConfigError, match="has its own tokenizer; leave --tokenizer"):
            prepare(spec, tmp_path / "out", model=str(model), tokenizer=str(model))
        with pytest.raises(DataError, match="no model directory"):
            prepare(spec, tmp_path / "out", model=str(prepared / "tokenizer"))
        chat_tokenizer(CHATML).save_pretrained(tmp_path / "model")
        (tmp_path / "model" / "config.json").write_text('{"vocab_size": 9}')
        with pytest.raises(DataError, match="its embedding 9 rows; the tokenizer is not"):
            prepare(spec, tmp_path / "out", model=str(tmp_path / "model"))
        packed = {"quantization_config": {"quant_method": "sparse_bitnet"}}
        for config, message in (
            (packed, "is packed, .*; give the model that was packed, or .* --tokenizer"),
            ({"model_type": "qwen2"}, "no tokenizer can be loaded .* none of tokenizer"),
            ([], r"config\.json: damaged"),
        ):
            shutil.rmtree(tmp_path / "model")
            (tmp_path / "model").mkdir()
            (tmp_path / "model" / "config.json").write_text(json.dumps(config))
            with pytest.raises(DataError, match=message):
                prepare(spec, tmp_path / "out", model=str(tmp_path / "model"))
        with pytest.raises(DataError, match=r"is a training run; give its model, --model .*model$"):
            prepare(spec, tmp_path / "out", model=str(tmp_path))
        assert not (tmp_path / "out").exists()

    def test_both_kinds(self, model, corpus, tmp_path):
        spec = write(tmp_path / "a.jsonl", conversations(3))
        with pytest.raises(ConfigError, match="both hold conversations"):
            prepare(spec, tmp_path / "out", model=str(model), validation_source=f"jsonl:{corpus}")

    def test_reading_as_text(self, tmp_path):
        spec = write(tmp_path / "a.jsonl", conversations(3))
        with pytest.raises(DataError, match="line 1: a conversation, where text is wanted"):
            list(open_source(spec))
        with pytest.raises(DataError, match=r"no field 'text'; it holds messages: name one as"):
            list(open_source(spec.removesuffix("#messages")))

    def test_a_bad_line(self, model, tmp_path):
        spec = write(tmp_path / "a.jsonl", [*conversations(3), [{"role": "x", "content": ""}]])
        with pytest.raises(DataError, match=r"a\.jsonl, line 4, message 0: role is 'x'"):
            prepare(spec, tmp_path / "out", model=str(model), validation=0)

    def test_nothing_to_learn(self, model, tmp_path):
        spec = write(tmp_path / "a.jsonl", [turns("who")])
        with pytest.raises(DataError, match="holds no text"):
            prepare(spec, tmp_path / "out", model=str(model), validation=0)
