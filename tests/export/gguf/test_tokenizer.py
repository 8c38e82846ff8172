"""Tokenizers as llama.cpp's keys: the name of a splitting only where that splitting is meant.

Whether llama.cpp then gives the same ids is asked of it in test_llama_cpp.py.
"""

import json

import pytest
from gguf import TokenType
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from sparse_bitnet.core import ConfigError
from sparse_bitnet.data.tokenizer import train_bpe
from sparse_bitnet.export.gguf.tokenizer import (
    LLAMA3_REGEX,
    QWEN2_REGEX,
    TEKKEN_REGEX,
    vocabulary,
)

TEXT = ["def main():\n    return the name of the file 1234 naïve\n"] * 30


def by_regex(regex):
    split = pre_tokenizers.Split(Regex(regex), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])


def byte_level(splitting, *, ignore_merges=False, normalizer=None, post=None, **bpe):
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer, backend.decoder = splitting, decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    for name, value in bpe.items():
        setattr(backend.model, name, value)
    if post:
        pair = [("<s>", 1), ("<|end|>", 0)]
        backend.post_processor = processors.TemplateProcessing(single=post, special_tokens=pair)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", bos_token="<s>")


def sentence_piece(form="always", merges=None):
    """A BPE in SentencePiece's manner: all splits of a token into tokens are merges."""
    words = ["▁", "a", "b", "ab", "▁a", "ba", "▁ab"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {token: number for number, token in enumerate(tokens)}
    if merges is None:
        merges = [
            (text[:cut], text[cut:])
            for text in words
            for cut in range(1, len(text))
            if text[:cut] in vocab and text[cut:] in vocab
        ]
    bpe = models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    backend = Tokenizer(bpe)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    replace = normalizers.Replace(" ", "▁")
    if form == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    elif form == "no prefix":
        backend.normalizer = replace
    elif form == "split":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=form, split=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )


DIGITS = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
)


@pytest.mark.parametrize(
    ("splitting", "ignore_merges", "name"),
    [
        (by_regex(QWEN2_REGEX), False, "qwen2"),
        (by_regex(LLAMA3_REGEX), True, "llama-bpe"),
        (by_regex(LLAMA3_REGEX), False, "smaug-bpe"),
        (by_regex(TEKKEN_REGEX), True, "tekken"),
        (pre_tokenizers.ByteLevel(False), False, "gpt-2"),
        (DIGITS, False, "smollm"),
    ],
)
def test_splittings_with_a_name(splitting, ignore_merges, name):
    words, _ = vocabulary(byte_level(splitting, ignore_merges=ignore_merges), 300)
    assert (words["tokenizer_model"], words["tokenizer_pre"]) == ("gpt2", name)
    assert len(words["token_merges"]) > 20 and all(
        len(m.split(" ")) == 2 for m in words["token_merges"]
    )
    assert "token_scores" not in words
    assert not words["add_bos_token"] and not words["add_eos_token"]


@pytest.mark.parametrize(
    "splitting",
    [
        by_regex(QWEN2_REGEX.replace(r"\p{N}|", r"\p{N}{1,2}|")),
        by_regex(r"\w+|\W+"),
        pre_tokenizers.ByteLevel(True),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(False), pre_tokenizers.ByteLevel(False)]),
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(QWEN2_REGEX), "removed"),
                pre_tokenizers.ByteLevel(False, use_regex=False),
            ]
        ),
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(QWEN2_REGEX), "isolated", invert=True),
                pre_tokenizers.ByteLevel(False, use_regex=False),
            ]
        ),
    ],
)
def test_splittings_without_a_name(splitting):
    with pytest.raises(
        ConfigError, match=r"no name for this tokenizer: its splitting .* known are"
    ):
        vocabulary(byte_level(splitting), 300)


def test_whole_words_before_merges_is_part_of_the_name():
    with pytest.raises(ConfigError, match="with ignore_merges True"):
        vocabulary(byte_level(by_regex(QWEN2_REGEX), ignore_merges=True), 300)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalizer": normalizers.Lowercase()}, "its normalizer is"),
        ({"end_of_word_suffix": "</w>"}, "has end_of_word_suffix = '</w>'"),
        ({"post": "$A <s>"}, "it puts the ids"),
        ({"post": "<s> <s> $A"}, "it puts the ids"),
    ],
)
def test_other_parts_that_have_no_key(options, message):
    with pytest.raises(ConfigError, match=message):
        vocabulary(byte_level(pre_tokenizers.ByteLevel(False), **options), 300)


@pytest.mark.parametrize("option", ["lstrip", "rstrip", "single_word"])
def test_added_tokens_that_take_their_surroundings(option):
    tokenizer = byte_level(pre_tokenizers.ByteLevel(False))
    tokenizer.add_tokens([AddedToken("<tool>", **{option: True})])
    with pytest.raises(ConfigError, match=f"added token '<tool>' has {option}"):
        vocabulary(tokenizer, 400)


def test_models_that_are_no_bpe():
    backend = Tokenizer(models.WordLevel({"a": 0, "<|end|>": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    with pytest.raises(ConfigError, match="its model is WordLevel, not BPE"):
        vocabulary(tokenizer, 2)


def test_our_own_tokenizer():
    tokenizer = train_bpe(TEXT, 300)
    tokenizer.add_tokens(["<tool>"])
    rows = len(tokenizer) + 2
    words, lost = vocabulary(tokenizer, rows)
    ids = tokenizer.get_vocab()
    assert words["tokenizer_pre"] == "qwen2"
    assert len(words["token_list"]) == len(words["token_types"]) == rows
    assert all(words["token_list"][number] == token for token, number in ids.items())
    assert words["token_list"][-2:] == [f"[PAD{rows - 2}]", f"[PAD{rows - 1}]"]
    assert words["token_types"][-3:] == [TokenType.USER_DEFINED, TokenType.UNUSED, TokenType.UNUSED]
    assert words["token_types"][tokenizer.eos_token_id] == TokenType.CONTROL
    # There is no BOS: without a key llama.cpp would take id 11.
    assert words["bos_token_id"] == words["eos_token_id"] == tokenizer.eos_token_id
    assert "pad_token_id" not in words and "unk_token_id" not in words
    assert "NFC" in lost[0]
    with pytest.raises(ConfigError, match=f"token id {rows - 3} and the model's embedding 200"):
        vocabulary(tokenizer, 200)


def test_no_end_of_sequence():
    tokenizer = byte_level(pre_tokenizers.ByteLevel(False))
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        vocabulary(tokenizer, 300)


@pytest.mark.parametrize(
    ("post", "bos", "eos"),
    [(None, False, False), ("<s> $A", True, False), ("<s> $A <|end|>", True, True)],
)
def test_tokens_around_a_text(post, bos, eos):
    words, _ = vocabulary(byte_level(pre_tokenizers.ByteLevel(False), post=post), 300)
    assert (words["add_bos_token"], words["add_eos_token"]) == (bos, eos)
    assert (words["bos_token_id"], words["eos_token_id"]) == (1, 0)


@pytest.mark.parametrize(
    ("form", "prefix"),
    [
        ("always", True),
        ("first", True),
        ("never", False),
        ("normalizer", True),
        ("no prefix", False),
    ],
)
def test_sentence_piece(form, prefix):
    words, lost = vocabulary(sentence_piece(form), 270)
    assert (words["tokenizer_model"], words["tokenizer_pre"]) == ("llama", "default")
    assert "token_merges" not in words
    assert words["add_space_prefix"] == prefix
    assert words["token_types"][0] == TokenType.UNKNOWN and words["unk_token_id"] == 0
    assert words["token_types"][1:3] == [TokenType.CONTROL] * 2
    assert words["token_types"][3:259] == [TokenType.BYTE] * 256
    scores = dict(zip(words["token_list"], words["token_scores"], strict=True))
    assert scores["ab"] > scores["▁a"] > scores["ba"] > scores["▁ab"] > scores["a"]
    assert (len(lost) == 1) == (form in ("always", "first"))


def test_sentence_piece_that_scores_cannot_say():
    with pytest.raises(ConfigError, match="are not SentencePiece's"):
        vocabulary(sentence_piece("split"), 270)
    missing = [("a", "b"), ("▁", "a"), ("b", "a"), ("▁a", "b")]
    with pytest.raises(ConfigError, match="'▁' and 'ab' make a token but are no merge"):
        vocabulary(sentence_piece(merges=missing), 270)
    mixed = [("a", "b"), ("▁", "ab"), ("▁", "a"), ("b", "a"), ("▁a", "b")]
    with pytest.raises(ConfigError, match="not in the order of the tokens"):
        vocabulary(sentence_piece(merges=mixed), 270)


def test_the_file_of_a_tokenizer_decides_not_its_class(tmp_path):
    tokenizer = train_bpe(TEXT, 300)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["pre_tokenizer"] = {"type": "Whitespace"}
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|endoftext|>"
    )
    with pytest.raises(ConfigError, match="Whitespace"):
        vocabulary(other, 300)
