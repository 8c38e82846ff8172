"""Conversations: the template, the history, what no longer fits, and the keys that stop things."""

import io

import pytest

from sparse_bitnet.core import ConfigError
from sparse_bitnet.serve import chat as chatting
from sparse_bitnet.serve.chat import Conversation, chat
from sparse_bitnet.serve.generate import Sampling, generate_text

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
GREEDY = Sampling()


@pytest.fixture
def speaker(tokenizer):
    tokenizer.chat_template = TEMPLATE
    yield tokenizer
    tokenizer.chat_template = None


def silent(_):
    pass


def test_turns_go_through_the_template(trained, speaker):
    model = trained("qwen2")
    model.config.max_position_embeddings = 512
    talk = Conversation(model, speaker, "be brief", 8, GREEDY)
    pieces = []
    first = talk.answer("def", pieces.append)
    assert first == "".join(pieces)
    assert first == generate_text(model, speaker, "[system]be brief[user]def[assistant]", 8)
    second = talk.answer("main", silent)
    said = f"[system]be brief[user]def[assistant]{first}[user]main[assistant]"
    assert second == generate_text(model, speaker, said, 8)
    assert [m["role"] for m in talk.messages] == ["system", *["user", "assistant"] * 2]
    talk.start_over()
    assert talk.answer("def", silent) == first


def test_without_a_template_the_text_goes_on(trained, tokenizer):
    model = trained("qwen2")
    talk = Conversation(model, tokenizer, None, 6, GREEDY)
    first = talk.answer("def main", silent)
    assert first == generate_text(model, tokenizer, "def main", 6)
    second = talk.answer("return", silent)
    assert second == generate_text(model, tokenizer, f"def main{first}\nreturn", 6)
    with pytest.raises(ConfigError, match="no chat template, so there is no place for --system"):
        Conversation(model, tokenizer, "be brief")
    with pytest.raises(ConfigError, match="--max-new-tokens is 0; it has to be 1 or more"):
        Conversation(model, tokenizer, max_new_tokens=0)


def test_old_turns_are_forgotten_when_the_context_is_full(trained, speaker, capsys):
    strict = "{% if messages[1].role != 'user' %}{{ raise_exception('who began?') }}{% endif %}"
    speaker.chat_template = strict + TEMPLATE  # as many a template insists
    talk = Conversation(trained("qwen2"), speaker, "x", 4, GREEDY)  # 64 positions
    for _ in range(5):
        talk.answer("def main", silent)
    assert talk.messages[0] == {"role": "system", "content": "x"}
    assert talk.messages[1]["role"] == "user" and len(talk.messages) < 9
    assert "the oldest turn no longer fits" in capsys.readouterr().err
    said = list(talk.messages)
    with pytest.raises(ConfigError, match=r"the line has .* tokens .* say it shorter"):
        talk.answer("def " * 60, silent)
    assert talk.messages == said


def test_old_text_is_forgotten_when_the_context_is_full(trained, tokenizer, capsys):
    talk = Conversation(trained("qwen2"), tokenizer, None, 4, GREEDY)
    talk.answer("return the name of " * 20, silent)
    assert "the beginning no longer fits" in capsys.readouterr().err


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(trained, speaker):
    model = trained("qwen2")
    talk = Conversation(model, speaker, None, 20, GREEDY)
    pieces = []

    def impatient(text):
        pieces.append(text)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    stopped = talk.answer("def", impatient)
    assert stopped == "".join(pieces[:3])
    assert talk.messages[-1] == {"role": "assistant", "content": stopped}
    assert isinstance(talk.answer("main", silent), str)


@pytest.fixture
def typed(monkeypatch):
    """Lines that someone types; an exception among them is raised."""

    def at_the_terminal(lines):
        def read(prompt):
            assert prompt == "> "
            line = next(lines)
            if isinstance(line, BaseException):
                raise line
            return line

        lines = iter([*lines, EOFError()])
        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(chatting.sys, "stdin", Terminal())

    return at_the_terminal


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_verb(pristine, typed, capsys):
    typed(["def main", KeyboardInterrupt(), "", "/new", "def main"])
    chat(pristine / "two-bit", max_new_tokens=5)
    shown = capsys.readouterr()
    assert "continues the text (it has no chat template)" in shown.err
    assert "Ctrl-D leaves" in shown.err and "a new conversation" in shown.err
    assert len(shown.out) > 4


def test_lines_from_a_pipe(pristine, monkeypatch, capsys):
    monkeypatch.setattr(chatting.sys, "stdin", io.StringIO("def main\n"))
    chat(pristine / "two-bit", max_new_tokens=5)
    assert ">" not in capsys.readouterr().out.splitlines()[0][:2]


def test_a_line_that_is_not_utf8_is_said_and_the_chat_goes_on(pristine, monkeypatch, capsys):
    lines = io.TextIOWrapper(io.BytesIO(b"caf\xe9\ndef main\n"), encoding="utf-8")
    monkeypatch.setattr(chatting.sys, "stdin", lines)
    chat(pristine / "two-bit", max_new_tokens=5)
    shown = capsys.readouterr()
    assert "the text is not UTF-8 at character 3" in shown.err and shown.out.strip()


def test_turns_and_instructions_that_are_no_text(trained, speaker):
    with pytest.raises(ConfigError, match="the text is not UTF-8 at character 0"):
        Conversation(trained("qwen2"), speaker, "\udce9")
    talk = Conversation(trained("qwen2"), speaker)
    with pytest.raises(ConfigError, match="not UTF-8 at character 3"):
        talk.answer("def\udce9", silent)
    assert talk.messages == []


def test_a_line_that_does_not_fit_is_said_and_the_chat_goes_on(tmp_path, pristine, typed, capsys):
    from sparse_bitnet.packed.load import load_unfused

    model, tokenizer = load_unfused(pristine / "two-bit")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    typed(["def " * 60, "def"])
    chat(tmp_path / "model", max_new_tokens=5)
    shown = capsys.readouterr()
    assert "say it shorter" in shown.err and shown.out.strip()
