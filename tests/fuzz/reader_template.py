"""A packed model with a chat template, as ``serve`` and ``chat`` use it.

What loads answers messages that passed the checks, or refuses them in words of ours.
"""

import json

import toy

from sparse_bitnet.packed.load import load_with_tokenizer
from sparse_bitnet.packed.write import pack
from sparse_bitnet.serve.chat import Conversation


def build(directory):
    pack(toy.model(), directory, tokenizer=toy.tokenizer(toy.TEMPLATE))


def read(directory, mutation):
    toy.spoil_template(directory, mutation)
    model, tokenizer = load_with_tokenizer(directory, device="cpu")
    if tokenizer.chat_template is not None:
        conversation = Conversation(model, tokenizer, max_new_tokens=2)
        conversation.answer(json.dumps({"a": [1]}), lambda _: None)
