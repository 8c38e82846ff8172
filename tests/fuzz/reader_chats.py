"""Conversations as ``data prepare`` reads them with a model's template, and their shards.

What is prepared, and what opens, are token ids in the vocabulary, of which the answers are marked;
those that were written, if nothing but the shards' index was damaged.
"""

import itertools
import json
import shutil

import numpy as np
import toy

from sparse_bitnet.data import Loader, TokenShards, prepare
from sparse_bitnet.train.presets import preset_config

NAMED = True
WORDS = ["some", "text", "to learn", "from é", "and then", " more\n", "of it"]
written = {}
count = itertools.count()


def build(directory):
    preset_config("tiny", toy.VOCABULARY).save_pretrained(directory)
    toy.tokenizer(toy.TEMPLATE).save_pretrained(directory)
    lines = []
    for number in range(1, 30):
        said = [" ".join(WORDS[turn::number]) or "no" for turn in range(number % 5 + 2)]
        roles = itertools.cycle(["user", "assistant"])
        messages = [{"role": role, "content": one} for role, one in zip(roles, said, strict=False)]
        lines.append(json.dumps({"messages": [{"role": "system", "content": "x"}, *messages]}))
    (directory / "chats.jsonl").write_text("\n".join(lines))
    prepared = directory.with_name("prepared")
    prepare_chats(directory, prepared)
    shutil.copytree(prepared / "train", directory / "shards")


def prepare_chats(directory, out):
    spec = f"jsonl:{directory / 'chats.jsonl'}#messages"
    prepare(spec, out, model=str(directory), validation=0, shard_tokens=1000, workers=1)


def read(directory, mutation):
    untouched = mutation.told == "nothing"
    if next(count) % 3 == 1:
        toy.spoil_template(directory, mutation)
    out = directory.parent / "prepared"
    shutil.rmtree(out, ignore_errors=True)
    prepare_chats(directory, out)
    for name, place in (("prepared", out / "train"), ("shards", directory / "shards")):
        shards = TokenShards(place)
        assert shards.total_tokens < 10**6
        tokens = shards.tokens(0, shards.total_tokens)
        assert tokens.max() < shards.vocab_size
        if shards.has_answers:
            learned, first = shards.marks([0], shards.total_tokens)
            assert learned.any() and not (learned & first).any()
        if untouched:
            written[name] = tokens
        if mutation.touched <= {"shards/index.json"} and name == "shards":
            assert np.array_equal(tokens, written[name]), "other tokens"
        Loader(shards, 64, 2).batch(0)
