"""Tokenizers of data preparation: any Hugging Face one, or a byte-level BPE trained on the text."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from sparse_bitnet.core.errors import ConfigError, DataError
from sparse_bitnet.data.chat import Chat
from sparse_bitnet.data.shards import token_dtype
from sparse_bitnet.files import read_json

EOS = "<|endoftext|>"
PLAIN_CLASSES = {"PreTrainedTokenizerFast", "TokenizersBackend"}  # all is in tokenizer.json
SMALLEST_VOCABULARY = 257  # the bytes and EOS
TRAINING_CHARACTERS = 64 << 20  # enough for stable merges; more only costs time and memory
PIECE_CHARACTERS = 1 << 20  # the tokenizer needs about 100 bytes of memory for each
LARGEST_TOKENIZER_BYTES = 1 << 29
MOST_MISSING_IDS = 1 << 20
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)
# What decides the ids of plain text; truncation, padding, templates and decoding do not.
IDENTITY = ("added_tokens", "model", "normalizer", "pre_tokenizer")


class Encoder:
    """A tokenizer as data preparation uses it: text to token ids, each document ended by EOS.

    Special tokens that stand in the text as characters are encoded as characters, so a document
    can neither end itself nor start a chat.

    Raises:
        DataError: if the tokenizer has no EOS token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, where: str = "tokenizer") -> None:
        if tokenizer.eos_token_id is None:
            raise DataError(
                f"{where}: has no EOS token, which must separate the documents; set eos_token in "
                "its tokenizer_config.json"
            )
        self.tokenizer, self.where = tokenizer, where
        self.eos_id = int(tokenizer.eos_token_id)
        self.vocab_size = vocabulary_size(tokenizer)  # the largest id + 1
        self.hash = tokenizer_hash(tokenizer)
        self._fast: Tokenizer | None = None
        if isinstance(tokenizer, PreTrainedTokenizerFast):
            self._fast = _plain_backend(tokenizer)
            self._fast.encode_special_tokens = True
            self._for_chats = _plain_backend(tokenizer)
            # Offsets of whole tokens, the spaces that they begin with included.
            self._for_chats.post_processor = processors.ByteLevel(trim_offsets=False)

    def dtype(self, has_answers: bool) -> np.dtype[Any]:
        """In which shards keep its tokens."""
        return token_dtype(self.vocab_size, has_answers)

    def encode(self, documents: Iterable[str]) -> np.ndarray:
        """Token ids of the documents one after the other, each ended by EOS: uint32 ``[tokens]``.

        Documents beyond a million characters are cut into pieces, at the end of a line where there
        is one, so that memory stays bounded.

        Raises:
            DataError: if the tokenizer gives an id beyond its own vocabulary.
        """
        arrays = [np.empty(0, dtype=np.uint32)]
        pending: list[str | None] = []  # None ends a document
        characters = 0
        for document in documents:
            for piece in _pieces(document):
                pending.append(piece)
                characters += len(piece)
                if characters >= PIECE_CHARACTERS:
                    arrays += self._arrays(pending)
                    pending, characters = [], 0
            pending.append(None)
        arrays += self._arrays(pending)
        return self._checked(np.concatenate(arrays))

    def encode_chats(self, chats: Sequence[Chat]) -> np.ndarray:
        """Tokens of conversations one after the other: ``[tokens]`` of ``shards.token_dtype``.

        The template's special tokens are encoded as such, and nothing is added. A token counts as
        an answer's where its first character does; the first token of a conversation never does.

        Raises:
            DataError: if the tokenizer is in Python only, which tells no token's place, or gives an
                id beyond its own vocabulary.
        """
        if self._fast is None:
            raise DataError(
                f"{self.where}: a tokenizer without tokenizer.json does not say where in the text "
                "its tokens stand, so answers cannot be found; convert it to a fast tokenizer"
            )
        arrays = []
        encoded = self._for_chats.encode_batch([c.text for c in chats], add_special_tokens=False)
        for chat, encoding in zip(chats, encoded, strict=True):
            tokens = np.zeros(len(encoding), dtype=self.dtype(has_answers=True))
            tokens["id"] = self._checked(np.array(encoding.ids, dtype=np.uint32))
            begins = np.array([start for start, _ in encoding.offsets])
            for start, end in chat.answers:
                tokens["answer"] |= (begins >= start) & (begins < end)
            tokens["answer"][:1] = 0
            tokens["first"][:1] = 1
            arrays.append(tokens)
        return np.concatenate(arrays)

    def _checked(self, tokens: np.ndarray) -> np.ndarray:
        largest = int(tokens.max(initial=0))
        if largest >= self.vocab_size:
            raise DataError(
                f"{self.where}: gave token id {largest}, beyond its own vocabulary of "
                f"{self.vocab_size}"
            )
        return tokens

    def _arrays(self, pending: list[str | None]) -> Iterator[np.ndarray]:
        """The ids of each piece; None becomes EOS."""
        texts = [piece for piece in pending if piece is not None]
        encoded: Iterator[list[int]]
        if self._fast is not None:
            # Without offsets, and with the interpreter's lock released: threads run in parallel.
            encodings = self._fast.encode_batch_fast(texts, add_special_tokens=False)
            encoded = (encoding.ids for encoding in encodings)
        else:
            plain = {"add_special_tokens": False, "split_special_tokens": True}
            encoded = (self.tokenizer(text, **plain)["input_ids"] for text in texts)
        for piece in pending:
            ids = [self.eos_id] if piece is None else next(encoded)
            yield np.array(ids, dtype=np.uint32)


def _plain_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def has_tokenizer(directory: str | Path) -> bool:
    """Whether a directory has a file that a tokenizer is read from."""
    return any((Path(directory) / file).is_file() for file in FILES)


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer of a directory or a name on the hub, with the splitting that its file says.

    ``AutoTokenizer`` does not always keep that: beside the config.json of a Qwen2 model (and of
    some others) it puts the architecture's own splitting in place of the file's, silently, and so
    gives other ids than those that the model was trained on. A directory whose tokenizer is of no
    particular class is therefore read as exactly what its tokenizer.json says.

    Raises:
        DataError: if there is none or it cannot be read.
    """
    try:
        directory = Path(name)
        if directory.is_dir() and not has_tokenizer(directory):
            # transformers would make an empty one of the config.json.
            raise FileNotFoundError(f"it has none of {', '.join(FILES)}")
        _refuse_sparse_ids(directory / "tokenizer.json")
        settings = get_tokenizer_config(str(name))
        if settings.get("tokenizer_class") in PLAIN_CLASSES:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(name))
        else:
            # Left out, transformers asks at the terminal whether to run code that comes with it.
            tokenizer = AutoTokenizer.from_pretrained(str(name), trust_remote_code=False)
        tokenizer("a")  # damaged settings show at the first use
        return tokenizer
    except BaseException as error:  # a dozen kinds, from missing files to JSON and hub errors
        # The tokenizers library panics at some damage, which is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(
            f"{name}: no tokenizer can be loaded from there; name a directory that "
            f"`save_pretrained` wrote ({error})"
        ) from error


def _refuse_sparse_ids(path: Path) -> None:
    """Refuse a vocabulary whose ids leave out more than they name.

    The tokenizers library keeps a list of the ids between that are missing: one id near 2³² takes
    gigabytes, and ends the process where there are none.
    """
    if not path.is_file():
        return
    state = read_json(path, LARGEST_TOKENIZER_BYTES)
    vocabulary = state["model"].get("vocab", {})
    named = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    named += [token["id"] for token in state.get("added_tokens") or []]
    largest = max((one for one in named if isinstance(one, int)), default=0)
    if largest > len(vocabulary) + len(named) + MOST_MISSING_IDS:
        raise ValueError(f"{path.name} has token id {largest}, but only {len(named)} tokens")


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of the canonical JSON of what decides the ids of plain text.

    Two tokenizers of one hash give the same ids, whatever their padding, truncation, chat template
    and file format.
    """
    text = json.dumps(_identity(tokenizer), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def extends(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer gives the ids of another one, but for tokens that were added to it."""
    mine, its = _identity(tokenizer), _identity(other)
    added, known = (identity.pop("added_tokens", None) or [] for identity in (mine, its))
    return mine == its and all(token in added for token in known)


def _identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    identity: dict[str, Any] = {key: state.get(key) for key in IDENTITY}
    # transformers writes an absent affix as null or as "", depending on the class.
    identity["model"] = {k: v for k, v in state["model"].items() if v not in (None, "")}
    return identity


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest token id + 1, added tokens included: the rows an embedding needs."""
    return max(tokenizer.get_vocab().values()) + 1


def train_bpe(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with Qwen2's splitting of words and the EOS token ``<|endoftext|>``.

    Qwen2's, because our presets are Qwen2 models and transformers gives every such model this
    splitting, whatever the file says; so ``AutoTokenizer`` agrees with what was trained. Text is
    normalised to NFC first.

    The same documents give the same tokenizer. Of more than 64 million characters it takes a fair
    sample of documents. A small text may have fewer merges than asked for, and so a smaller
    vocabulary.

    Raises:
        ConfigError: if ``vocab_size`` does not hold the 256 bytes and EOS.
        DataError: if there is no text.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(
            f"--vocab-size is {vocab_size}; a byte-level BPE needs at least {SMALLEST_VOCABULARY}, "
            "the 256 bytes and EOS"
        )
    sample = fair_sample(documents, TRAINING_CHARACTERS)
    if not any(sample):
        raise DataError("no text to train a tokenizer on: the source is empty")
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(sample, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)


def fair_sample(documents: Iterable[str], limit: int) -> list[str]:
    """Documents in order: all of them up to ``limit`` characters, else those of lowest hash.

    The hash decides, so the choice does not depend on what stands first, and needs one pass. A
    document longer than ``limit`` is cut off there.
    """
    kept: list[tuple[int, int, str]] = []  # a heap, the largest hash first
    total = 0
    for number, document in enumerate(documents):
        text = document[:limit]
        heapq.heappush(kept, (-document_hash(text.encode()), number, text))
        total += len(text)
        while total > limit and len(kept) > 1:
            total -= len(heapq.heappop(kept)[2])
    return [text for _, _, text in sorted(kept, key=lambda entry: entry[1])]


def document_hash(text: bytes) -> int:
    """64 bits that depend on a document's content alone."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end = text.rfind("\n", start + 1, start + PIECE_CHARACTERS)
        if end < 0:
            end = start + PIECE_CHARACTERS
        yield text[start:end]
        start = end
    yield text[start:]
