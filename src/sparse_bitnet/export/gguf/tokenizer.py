"""Hugging Face tokenizer → ``tokenizer.ggml`` keys of a GGUF file.

llama.cpp holds the splitting of words as code under a name, ``tokenizer.ggml.pre``; a file names
it. Its own converter finds the name by the hash of a long text's ids, which knows published
vocabularies only. Here the tokenizer's definition decides: the splitting in ``tokenizer.json`` has
to be one that a name stands for, step by step. What has no name is refused: llama.cpp would fall
back to another splitting and answer in garbage.

Two families exist there: byte-level BPE (``gpt2``: Qwen, Llama 3, GPT-2, SmolLM, Tekken) and
SentencePiece's BPE (``llama``: Llama 2, Mistral), which merges by a score instead of a list.
"""

from __future__ import annotations

import json
import re
from itertools import pairwise, product
from typing import Any

from gguf import TokenType
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2_REGEX

from sparse_bitnet.core import ConfigError

LLAMA3_REGEX = QWEN2_REGEX.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
TEKKEN_REGEX = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# (splitting, does a whole word that is a token win over the merges) → tokenizer.ggml.pre.
BYTE_LEVEL = ("bytes", False)
GPT2 = ("bytes", True)  # with the splitting of GPT-2 built in
PRE_NAMES: dict[tuple[tuple[object, ...], bool], str] = {
    ((("split", QWEN2_REGEX), BYTE_LEVEL), False): "qwen2",
    ((("split", LLAMA3_REGEX), BYTE_LEVEL), True): "llama-bpe",
    ((("split", LLAMA3_REGEX), BYTE_LEVEL), False): "smaug-bpe",
    ((("split", TEKKEN_REGEX), BYTE_LEVEL), True): "tekken",
    ((("digits",), GPT2), False): "smollm",
    ((GPT2,), False): "gpt-2",
}
SPACE = "▁"
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
NO_MERGE = -1e6  # the score of a token that no merge makes, below all that one makes


def vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int) -> tuple[dict[str, Any], list[str]]:
    """The keys for a tokenizer, padded with unused tokens to the ``rows`` of the embedding.

    Returns:
        NAME of ``gguf.GGUFWriter.add_NAME`` → its argument; and what llama.cpp does otherwise, for
        people.

    Raises:
        ConfigError: for a tokenizer that llama.cpp has no name for, naming the part.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise _refuse(f"a {type(tokenizer).__name__} has no tokenizer.json")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model.get("type") != "BPE":
        raise _refuse(f"its model is {model.get('type')}, not BPE")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise _refuse(f"its BPE has {option} = {model[option]!r}")
    tokens, types = _tokens(state, rows)
    merges = [(left, right) for left, right in model["merges"]]
    lost: list[str] = []
    keys: dict[str, Any] = {"token_list": tokens}
    if model.get("byte_fallback"):
        keys |= {"tokenizer_model": "llama", "tokenizer_pre": "default"}
        keys["add_space_prefix"] = _space_prefix(state, lost)
        for number, text in enumerate(tokens):
            if BYTE_TOKEN.fullmatch(text):
                types[number] = TokenType.BYTE
        keys["token_scores"] = _scores(model["vocab"], merges, tokens, types)
    else:
        keys |= {"tokenizer_model": "gpt2", "tokenizer_pre": _pre_name(state, lost)}
        keys["token_merges"] = [f"{left} {right}" for left, right in merges]
    unknown = model.get("unk_token")
    if unknown is not None and unknown in model["vocab"]:
        types[model["vocab"][unknown]] = TokenType.UNKNOWN
    keys["token_types"] = [int(kind) for kind in types]
    keys["add_bos_token"], keys["add_eos_token"] = _added_around(tokenizer)
    if tokenizer.eos_token_id is None:
        raise _refuse("it has no end-of-sequence token, so generation would not stop")
    # Without a BOS llama.cpp takes id 11. Generation from nothing begins with EOS here too.
    bos = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    special = {
        "bos": bos,
        "eos": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
        "unk": None if unknown is None else tokenizer.convert_tokens_to_ids(unknown),
    }
    keys |= {f"{name}_token_id": int(i) for name, i in special.items() if i is not None}
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    return keys | ({"chat_template": template} if template else {}), lost


def _tokens(state: dict[str, Any], rows: int) -> tuple[list[str], list[TokenType]]:
    tokens = [f"[PAD{number}]" for number in range(rows)]
    types = [TokenType.UNUSED] * rows
    vocab: dict[str, int] = state["model"]["vocab"]
    largest = max([*vocab.values(), *(token["id"] for token in state["added_tokens"])])
    if largest >= rows:
        raise ConfigError(
            f"gguf: the tokenizer has token id {largest} and the model's embedding {rows} rows; "
            "export the model with its own tokenizer"
        )
    for text, number in vocab.items():
        tokens[number], types[number] = text, TokenType.NORMAL
    for token in state["added_tokens"]:
        for option in ("single_word", "lstrip", "rstrip"):
            if token.get(option):
                raise _refuse(f"its added token {token['content']!r} has {option}")
        number = token["id"]
        tokens[number] = token["content"]
        types[number] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    return tokens, types


def _pre_name(state: dict[str, Any], lost: list[str]) -> str:
    """``tokenizer.ggml.pre`` of a byte-level BPE."""
    normalizer = state.get("normalizer")
    if normalizer is not None:
        if normalizer["type"] != "NFC":
            raise _refuse(f"its normalizer is {_short(normalizer)}")
        lost.append("llama.cpp does not bring text into NFC; give it text that is (most is)")
    steps = tuple(_step(step) for step in _sequence(state.get("pre_tokenizer"), "pretokenizers"))
    ignores = bool(state["model"].get("ignore_merges"))
    name = PRE_NAMES.get((steps, ignores))
    if name is None:
        raise _refuse(
            f"its splitting of words is {_short(state.get('pre_tokenizer'))} with ignore_merges "
            f"{ignores}; known are those of {', '.join(sorted(PRE_NAMES.values()))}"
        )
    if name == "tekken":
        lost.append("llama.cpp cuts words of mixed case outside a–z otherwise (its own tekken)")
    return name


def _step(step: dict[str, Any]) -> tuple[object, ...]:
    """The part of a pre-tokenizer that decides where words are split."""
    kind = step["type"]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return ("bytes", bool(step.get("use_regex", True)))
    if kind == "Digits" and step.get("individual_digits"):
        return ("digits",)
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return ("split", step["pattern"].get("Regex"))
    return ("unknown",)


def _space_prefix(state: dict[str, Any], lost: list[str]) -> bool:
    """Does a SentencePiece-like tokenizer begin every text with a space? It refuses others."""
    normalizers = _sequence(state.get("normalizer"), "normalizers")
    steps = _sequence(state.get("pre_tokenizer"), "pretokenizers")
    if not normalizers and len(steps) == 1 and steps[0]["type"] == "Metaspace":
        step = steps[0]
        if step["replacement"] == SPACE and not step.get("split", True):
            prefix = step.get("prepend_scheme", "always") != "never"
            if prefix:
                lost.append("llama.cpp puts a space before a text that begins with one already")
            return bool(prefix)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    if not steps and normalizers in ([replace], [prepend, replace]):
        return len(normalizers) == 2
    raise _refuse(
        f"it falls back to bytes, and its normalizer {_short(state.get('normalizer'))} and "
        f"splitting {_short(state.get('pre_tokenizer'))} are not SentencePiece's"
    )


def _scores(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    tokens: list[str],
    types: list[TokenType],
) -> list[float]:
    """A score for each token so that merging the best-scored neighbours is merging by rank.

    SentencePiece joins any neighbours whose text is a token. So every such pair has to be among
    the merges, and those that make one token have to follow each other.
    """
    made = [left + right for left, right in merges]
    order: dict[str, int] = {}
    for text in made:
        order.setdefault(text, len(order))
    ranks = [order[text] for text in made]
    if any(before > after for before, after in pairwise(ranks)):
        raise _refuse("its merges are not in the order of the tokens that they make")
    listed = set(merges)
    for text, kind in zip(tokens, types, strict=True):
        cuts = range(1, len(text)) if kind == TokenType.NORMAL else ()
        for left, right in ((text[:cut], text[cut:]) for cut in cuts):
            if left in vocab and right in vocab and (left, right) not in listed:
                raise _refuse(f"{left!r} and {right!r} make a token but are no merge")
    return [-float(order[token]) if token in order else NO_MERGE for token in tokens]


def _added_around(tokenizer: PreTrainedTokenizerFast) -> tuple[bool, bool]:
    """Does the tokenizer put BOS before and EOS behind a text? Anything else has no key."""
    plain = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).ids
    around = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).ids
    for bos, eos in product((False, True), repeat=2):
        before, behind = [tokenizer.bos_token_id] * bos, [tokenizer.eos_token_id] * eos
        if around == before + plain + behind:
            return bos, eos
    raise _refuse(f"it puts the ids {around} around a text, more than BOS and EOS")


def _sequence(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return step[key] if step["type"] == "Sequence" else [step]


def _short(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)[:300]


def _refuse(reason: str) -> ConfigError:
    return ConfigError(
        f"gguf: llama.cpp has no name for this tokenizer: {reason}. It would split text otherwise "
        "than in training; train with a tokenizer of `data prepare`, or of Qwen, Llama or Mistral"
    )
