"""Text that grows by tokens, against the text of all tokens."""

import random

import pytest

from sparse_bitnet.serve.text import TextStream, split_tool_calls


def pieces(tokenizer, text, stops=()):
    stream = TextStream(tokenizer, stops)
    found = []
    for token in tokenizer(text).input_ids:
        found.append(stream.add([token]))
        if stream.has_stopped:
            break
    return [*found, stream.end()], stream.has_stopped


@pytest.mark.parametrize("text", ["def main():", "日本語 😀 é", "a\n\n  b", "<|end|>x", ""])
def test_pieces_are_the_text(tokenizer, text):
    expected = tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)
    found, _ = pieces(tokenizer, text)
    assert "".join(found) == expected
    assert not any("�" in piece for piece in found)


def test_half_a_character_at_the_end(tokenizer):
    ids = tokenizer("x😀").input_ids[:-1]
    stream = TextStream(tokenizer)
    before = [stream.add([token]) for token in ids]
    assert "".join(before) == "x" and stream.end() == tokenizer.decode(ids)[1:]


def test_stops_at_any_place(tokenizer):
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices("ab", k=12))
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 5))) for _ in range(2)]
        found, stopped = pieces(tokenizer, text, stops)
        places = [text.find(stop) for stop in stops if stop in text]
        assert stopped == bool(places)
        # The stop that is whole first ends it, which may begin after one that is whole later.
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        if stopped:
            end = min(ends)
            begin = min(text.find(s) for s in stops if s in text and text.find(s) + len(s) == end)
            assert "".join(found) == text[:begin]
        else:
            assert "".join(found) == text


def test_tool_calls():
    call = '<tool_call>\n{"name": "f", "arguments": {"x": [1, {"y": 2}]}}\n</tool_call>'
    text, calls = split_tool_calls(f"So: {call}")
    assert text == "So:"
    assert calls == [{"name": "f", "arguments": '{"x": [1, {"y": 2}]}'}]
    for other in ("plain", "<tool_call>{}</tool_call>", "<tool_call>{x}</tool_call>"):
        assert split_tool_calls(other) == (other, [])
