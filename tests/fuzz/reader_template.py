"""A packed model with a chat template, as ``serve`` and ``chat`` use it.

What loads answers messages that passed the checks, or refuses them in words of ours.
"""

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from sparse_bitnet.data.tokenizer import train_bpe
from sparse_bitnet.nn import convert
from sparse_bitnet.packed.load import load_with_tokenizer
from sparse_bitnet.packed.write import pack
from sparse_bitnet.serve.chat import Conversation
from sparse_bitnet.train.presets import preset_config

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' and m.content | length > 90 %}"
    "{{ raise_exception('too long') }}{% endif %}{{ '<' + m.role + '>' + m.content | trim }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
PIECES = [
    *["{{", "}}", "{%", "%}", "for", "endfor", "if", "messages", "m.content", "[0]", "|", "trim"],
    *["loop", "range(9)", "9", "'", "__class__", ".", "(", ")", "+", "*", "raise_exception('x')"],
    *["tools", "undefined_name", "1 / 0", "m.role.x.y", "{# #}", "| tojson", "| sum", "\ud800"],
]


def build(directory: Path) -> None:
    torch.manual_seed(0)
    tokenizer = train_bpe(["some text to learn from, and then some more of it"], 300)
    tokenizer.chat_template = TEMPLATE
    model: Any = AutoModelForCausalLM.from_config(preset_config("tiny", 300))
    convert(model, "6:8")
    pack(model.eval(), directory, tokenizer=tokenizer)


def read(directory: Path, mutation: Any) -> None:
    rng = random.Random(mutation.told)
    path = directory / "chat_template.jinja"
    if mutation.told != "nothing" and path.is_file() and not path.is_symlink():
        text = path.read_bytes().decode("utf-8", "surrogateescape")
        for _ in range(rng.choice([1, 1, 3])):
            place = rng.randrange(len(text) + 1)
            text = text[:place] + rng.choice(PIECES) + text[place + rng.choice([0, 0, 1, 9]) :]
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    model, tokenizer = load_with_tokenizer(directory, device="cpu")
    if tokenizer.chat_template is not None:
        conversation = Conversation(model, tokenizer, max_new_tokens=2)
        conversation.answer(json.dumps({"a": [1]}), lambda _: None)
