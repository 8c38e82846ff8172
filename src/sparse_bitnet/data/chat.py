"""Conversations as documents: rendered by the model's own chat template, the answers marked.

Loss is taken on answers alone, so each conversation is kept as its text and the stretches of it
that the model is to say. A template that marks them itself (``{% generation %}``) is believed.
Another one is rendered at every prefix: before an answer with the header that asks for it, and
after the answer. Where each rendering begins with the one before it, what an answer adds is the
answer, its end token included; a template that rewrites what came before is refused.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from sparse_bitnet.console import say
from sparse_bitnet.core.errors import DataError, shown

ROLES = {"system", "developer", "user", "assistant", "tool"}
MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")

Messages = list[dict[str, Any]]


class Chat(NamedTuple):
    """A rendered conversation."""

    text: str  # with the template's special tokens written out
    answers: list[tuple[int, int]]  # its stretches [start, end), in characters, that are learned


def check_messages(value: Any, place: str) -> Messages:
    """Messages as a dataset holds them: role and content, text alone.

    Raises:
        DataError: naming the place and the message.
    """
    if not isinstance(value, list) or not value:
        raise DataError(f"{place}: messages is {shown(value)}; it must be a list of one or more")
    messages = []
    for number, message in enumerate(value):
        where = f"{place}, message {number}"
        if not isinstance(message, dict):
            raise DataError(f"{where}: is {shown(message)}, not an object with role and content")
        given = {key: part for key, part in message.items() if part is not None}
        role, content = given.get("role"), given.get("content")
        if not isinstance(role, str) or role not in ROLES:
            known = ", ".join(sorted(ROLES))
            raise DataError(f"{where}: role is {shown(role)}; it must be one of {known}")
        if not isinstance(content, str) and not (content is None and "tool_calls" in given):
            raise DataError(f"{where}: content is {shown(content)}; it must be text")
        messages.append(given)
    try:
        json.dumps(messages, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # JSON can escape half a character
        raise DataError(f"{place}: messages are not valid Unicode ({error.reason})") from error
    return messages


class ChatTemplate:
    """A tokenizer's chat template.

    Raises:
        DataError: if the tokenizer has no template, or several and none is the default.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
        try:
            self.text: str = tokenizer.get_chat_template()
        except ValueError as error:
            raise DataError(
                f"{where}: has no chat template, which says how conversations are written; take a "
                f"chat model's tokenizer, or put chat_template.jinja beside it ({error})"
            ) from error
        self.left_out: Counter[str] = Counter()  # conversations not rendered, by the reason
        self._tokenizer = tokenizer
        self._marks_answers = MARKS_ANSWERS.search(self.text) is not None
        added = tokenizer.added_tokens_decoder.values()
        self._special = {str(token) for token in added if token.special}
        self._special.update(tokenizer.all_special_tokens)

    def render(self, messages: Messages, place: str) -> Chat | None:
        """A conversation, or None if nothing of it can be learned; ``left_out`` counts why.

        Raises:
            DataError: if the template refuses the messages, or rewrites earlier ones.
        """
        answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        contents = [message.get("content", "") for message in messages]
        reason = ""
        if not any(answers):  # an answer to nothing, at the very beginning, is none
            reason = "without an answer"
        elif any(not contents[n].strip() and "tool_calls" not in messages[n] for n in answers):
            reason = "with an empty answer"
        elif any(token in text for text in _strings(messages) for token in self._special):
            reason = "with a special token written out as text"
        if reason:
            self.left_out[reason] += 1
            return None
        try:
            if self._marks_answers:
                chat = self._marked(messages)
            else:
                chat = self._by_prefixes(messages, [n for n in answers if n], place)
        except DataError:
            raise
        except Exception as error:  # jinja's own, and whatever an expression raises
            raise DataError(f"{place}: the chat template says: {str(error)[:300]}") from error
        calls = any("tool_calls" in messages[n] for n in answers)
        said = [self._says(chat.text[start:end]) for start, end in chat.answers]
        if calls and not (said and all(said)):
            self.left_out["with an empty answer"] += 1
            return None
        if not any(start < end for start, end in chat.answers):
            raise DataError(f"{place}: the chat template leaves nothing of the answers to learn")
        return chat

    def report(self) -> None:
        if self.left_out:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.left_out.items())
            say(f"warning: left out {self.left_out.total():,} conversations: {reasons}")

    def _says(self, answer: str) -> bool:
        """Whether it holds more than special tokens; of calls that a template does not write,
        the end token alone is left."""
        for token in self._special:
            answer = answer.replace(token, "")
        return bool(answer.strip())

    def _marked(self, messages: Messages) -> Chat:
        special: dict[str, Any] = {**self._tokenizer.special_tokens_map}
        rendered: Any = render_jinja_template(
            [messages], chat_template=self.text, return_assistant_tokens_mask=True, **special
        )
        (text,), (marked,) = rendered
        answers = [(start, end) for start, end in marked if start < end]
        if messages[0]["role"] == "assistant" and len(messages) > 1:
            answers = answers[len(self._marked(messages[:1]).answers) :]
        return Chat(text, answers)

    def _by_prefixes(self, messages: Messages, answers: list[int], place: str) -> Chat:
        before = ""
        stretches = []
        for number in answers:
            asked = self._render(messages[:number], add_generation_prompt=True)
            answered = self._render(messages[: number + 1])
            if not (asked.startswith(before) and answered.startswith(asked)):
                raise DataError(
                    f"{place}, message {number}: the chat template writes what comes before this "
                    "answer otherwise once it is there, so the answer's place is not known; use a "
                    "template that marks answers with {% generation %}"
                )
            if "add_generation_prompt" not in self.text:
                # Then any answer's header comes with it.
                others = [[*messages[:number], {"role": "assistant", "content": c}] for c in "ab"]
                renderings = [answered, *map(self._render, others)]
                header = os.path.commonprefix(renderings)  # noqa: RUF071 - of characters
                if header[len(asked) :].strip():
                    asked = header
            # Space alone is the answer's own: it is often one token with the first word. What
            # follows the end token, a line's end most often, is never said by the model.
            stretches.append((len(asked.rstrip(" ")), len(answered.rstrip())))
            before = answered
        whole = before if answers[-1] == len(messages) - 1 else self._render(messages)
        if not whole.startswith(before):
            raise DataError(
                f"{place}: the chat template writes the conversation otherwise than its beginning; "
                "use a template that marks answers with {% generation %}"
            )
        return Chat(whole, stretches)

    def _render(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        text = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        assert isinstance(text, str)
        return text


def _strings(value: Any) -> Iterator[str]:
    """Every string of a JSON value, keys included: a template may write any of them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
    elif isinstance(value, dict):
        yield from _strings([*value, *value.values()])
