"""Text to token shards: ``OUT/tokenizer``, ``OUT/train`` and ``OUT/validation``.

The work is cut into parts, each a run of consecutive documents that fills one shard of a split.
A part's files are renamed into place when whole, then the part is noted in the journal
(``OUT/prepare.json``), and the splits' indexes are written at the very end. So a run that was
killed goes on after its last part, and ends with the same bytes as one that was not.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparse_bitnet.console import say
from sparse_bitnet.core.errors import ConfigError, DataError
from sparse_bitnet.data.chat import ChatTemplate
from sparse_bitnet.data.encode import MEGABYTE, Selection, encode, reading
from sparse_bitnet.data.journal import TOKENIZER, TRAIN, VALIDATION, Journal, discard, open_journal
from sparse_bitnet.data.shards import INDEX, TokenShards, find_damage, index_text
from sparse_bitnet.data.sources import Source, open_source
from sparse_bitnet.data.tokenizer import Encoder, load_tokenizer, train_bpe
from sparse_bitnet.files import atomic_directory, read_json, write_text

DEFAULT_VOCABULARY = 8192
NO_LIMIT = float("inf")


def prepare(
    source: str,
    out: str | Path,
    *,
    model: str | None = None,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    validation: float = 0.01,
    validation_source: str | None = None,
    max_bytes: int | None = None,
    shard_tokens: int = 100_000_000,
    workers: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Tokenize a source into memory-mapped shards.

    Every document of text is ended by EOS. Conversations (a field called messages) are written by
    the tokenizer's chat template, and their answers alone are learned. A document is held out for
    validation when the hash of its content falls below the fraction, so copies of one document
    never stand on both sides.

    Args:
        source: stdlib, text:PATH, jsonl:PATH[#FIELD], parquet:PATH[#FIELD] or
            hf:NAME[:CONFIG][:SPLIT][#FIELD]; #messages for conversations.
        out: directory to write; what an interrupted run with the same settings left is reused.
        model: directory of the model to train from; its own tokenizer is taken.
        tokenizer: directory or name of a Hugging Face tokenizer; trained on the source if left out.
        vocab_size: of the byte-level BPE to train (8192 if left out).
        validation: fraction of the documents held out; 0 for none.
        validation_source: hold out this whole source instead of a fraction.
        max_bytes: read no further than the document that reaches this many bytes of text.
        shard_tokens: a shard is closed at this many tokens; what an interruption loses at most.
        workers: threads; one a core if left out.
        overwrite: start afresh, whatever an earlier run left there.

    Returns:
        ``{"out", "tokenizer_hash", "vocab_size", "train", "validation", "left_out", "reused",
        "seconds"}``; the splits as ``{"tokens", "documents", "bytes", "shards"}``, validation None
        if there is none; how many documents were empty, or conversations with nothing to learn.

    Raises:
        ConfigError: for settings out of range or contradicting each other.
        DataError: if the source cannot be read, is empty or leaves a split empty, or if ``out``
            holds something else.
    """
    if model is not None and tokenizer is not None:
        raise ConfigError(f"--model {model} has its own tokenizer; leave --tokenizer out")
    if vocab_size is not None and (named := tokenizer or model) is not None:
        raise ConfigError(
            f"--vocab-size is for training a tokenizer, and {named} has one; leave it out"
        )
    if not 0 <= validation < 1:
        raise ConfigError(f"--validation is {validation}; it is a fraction of at least 0, below 1")
    numbers = {"max_bytes": max_bytes, "shard_tokens": shard_tokens, "workers": workers}
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    started, out = time.monotonic(), Path(out)
    limit = NO_LIMIT if max_bytes is None else float(max_bytes)
    held_out = validation if validation_source is None else 0.0
    selections = [Selection(open_source(source), limit, held_out)]
    if validation_source is not None:
        only = open_source(validation_source)
        selections.append(Selection(only, NO_LIMIT, 0.0, (VALIDATION, VALIDATION)))
    given = _given_tokenizer(model, tokenizer)
    vocab_size = vocab_size or DEFAULT_VOCABULARY
    settings = {
        "source": source,
        "tokenizer": given.hash if given else f"byte-level BPE of {vocab_size}",
        "validation": validation if validation_source is None else validation_source,
        "max_bytes": max_bytes,
        "shard_tokens": shard_tokens,
        "files": [selection.source.fingerprint for selection in selections],
        **_chat_settings([selection.source for selection in selections], given),
    }
    with open_journal(out, settings, overwrite) as journal:
        encoder = _tokenizer(out, journal, given, vocab_size, selections[0])
        has_answers = selections[0].source.has_chats
        found, intact = len(journal.parts), _intact_parts(out, journal, encoder, has_answers)
        reused = journal.finished and intact == found
        if not reused:
            if found:
                say(f"{out}: {intact} of {found} finished parts are intact; going on after them")
            del journal.parts[intact:]
            journal.finished = False
            for number, selection in enumerate(selections):
                threads = workers or os.cpu_count() or 1
                encode(number, selection, encoder, journal, out, shard_tokens, threads)
            try:
                _check_splits(journal, selections)
            except DataError:
                discard(out)  # of no use, and in the way of the other settings that are asked for
                raise
        _write_indexes(out, journal, encoder, has_answers)
        if not reused:
            journal.finished = True
            journal.save(out)
    train = TokenShards(out / TRAIN)
    validated = TokenShards(out / VALIDATION) if journal.shards(VALIDATION) else None
    if reused:
        say(f"{out}: already prepared, {train.total_tokens:,} training tokens; reused")
    return {
        "out": str(out),
        "tokenizer_hash": train.tokenizer_hash,
        "vocab_size": train.vocab_size,
        TRAIN: train.totals,
        VALIDATION: validated.totals if validated else None,
        "left_out": _left_out(journal),
        "reused": reused,
        "seconds": time.monotonic() - started,
    }


def _given_tokenizer(model: str | None, tokenizer: str | None) -> Encoder | None:
    if model is None:
        return None if tokenizer is None else Encoder(load_tokenizer(tokenizer), tokenizer)
    config = _model_config(Path(model))
    encoder = Encoder(load_tokenizer(model), model)
    rows = config.get("vocab_size")
    if isinstance(rows, int) and rows < encoder.vocab_size:
        raise DataError(
            f"{model}: its tokenizer has {encoder.vocab_size} tokens, its embedding {rows} rows; "
            "the tokenizer is not the model's own"
        )
    return encoder


def _model_config(directory: Path) -> dict[str, Any]:
    """The ``config.json`` of a model that can be trained."""
    path = directory / "config.json"
    if not path.is_file():
        inside = directory / "model"
        if (inside / "config.json").is_file():
            raise DataError(f"{directory} is a training run; give its model, --model {inside}")
        raise DataError(
            f"{directory}: no model directory (it has no config.json); a GGUF file becomes one by "
            "`sparse-bitnet import`, and a tokenizer alone is named by --tokenizer"
        )
    try:
        config: dict[str, Any] = read_json(path)
        packed = (config.get("quantization_config") or {}).get("quant_method") == "sparse_bitnet"
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path}: damaged ({error})") from error
    if packed:
        raise DataError(
            f"{directory} is packed, and packed models are not trained; give the model that was "
            f"packed, or its tokenizer alone, --tokenizer {directory}"
        )
    return config


def _chat_settings(sources: list[Source], encoder: Encoder | None) -> dict[str, str]:
    """What else decides the tokens of conversations: the template."""
    if not any(source.has_chats for source in sources):
        return {}
    if not all(source.has_chats for source in sources):
        raise ConfigError(
            "the source and --validation-source must both hold conversations (#messages), or both "
            "text"
        )
    if encoder is None:
        raise ConfigError(
            f"{sources[0].spec}: conversations are written by a model's chat template: name the "
            "model (--model DIRECTORY), or a tokenizer that has one"
        )
    template = ChatTemplate(encoder.tokenizer, encoder.where)
    return {"chat_template": hashlib.sha256(template.text.encode()).hexdigest()}


def _left_out(journal: Journal) -> int:
    """Documents that were read, less those in the shards."""
    read = {part.source: part.documents for part in journal.parts}  # the last part of each
    shards = [shard for part in journal.parts for shard in part.shards.values()]
    return sum(read.values()) - sum(shard.documents for shard in shards)


def _tokenizer(
    out: Path, journal: Journal, given: Encoder | None, vocab_size: int, selection: Selection
) -> Encoder:
    """The tokenizer in ``out``, copied there or trained first if it is not there yet."""
    directory = out / TOKENIZER
    if journal.tokenizer_hash is None:
        made = given or Encoder(train_bpe(_training_texts(selection), vocab_size))
        with atomic_directory(directory) as temporary:
            made.tokenizer.save_pretrained(temporary)
        journal.tokenizer_hash = made.hash
        journal.save(out)
    encoder = Encoder(load_tokenizer(directory), str(directory))
    if encoder.hash != journal.tokenizer_hash:
        raise DataError(
            f"{directory}: not the tokenizer that this preparation began with; it was edited since "
            "or changes when saved: prepare again with --overwrite, or use another"
        )
    return encoder


def _training_texts(selection: Selection) -> Iterator[str]:
    """The documents that are not held out."""
    text_bytes = 0
    with reading(f"read {selection.source.spec} to train a tokenizer", selection.source) as show:
        for text, split, size, position in selection.documents():
            text_bytes += size
            show(position, text_bytes, "")
            if split == TRAIN:
                yield text
    say(f"training a tokenizer on {text_bytes / MEGABYTE:,.1f} MB of text")


def _intact_parts(out: Path, journal: Journal, encoder: Encoder, has_answers: bool) -> int:
    """How many of the journal's first parts still have all their files, as they were written."""
    damaged = []
    for split in (TRAIN, VALIDATION):
        dtype = encoder.dtype(has_answers)
        found = find_damage(out / split, journal.shards(split), dtype, encoder.vocab_size)
        if found:
            damaged.append(found[0])
    numbers = (n for n, part in enumerate(journal.parts) if set(part.shards.values()) & {*damaged})
    return next(numbers, len(journal.parts))


def _check_splits(journal: Journal, selections: list[Selection]) -> None:
    if not journal.parts:
        raise DataError(f"{selections[0].source.spec}: the source holds no text")
    wanted = selections[0].held_out > 0 or len(selections) > 1
    if wanted and not journal.shards(VALIDATION):
        documents = sum(shard.documents for shard in journal.shards(TRAIN))
        raise DataError(
            f"{selections[-1].source.spec}: nothing was held out, of {documents} documents; raise "
            "--validation, name a --validation-source that has text, or give --validation 0"
        )
    if not journal.shards(TRAIN):
        raise DataError(
            f"{selections[0].source.spec}: every document was held out and none is left to train "
            "on; lower --validation"
        )


def _write_indexes(out: Path, journal: Journal, encoder: Encoder, has_answers: bool) -> None:
    for split in (TRAIN, VALIDATION):
        path, shards = out / split / INDEX, journal.shards(split)
        text = index_text(
            shards,
            tokenizer_hash=encoder.hash,
            vocab_size=encoder.vocab_size,
            eos_id=encoder.eos_id,
            answers=has_answers,
        )
        if shards and not (path.is_file() and path.read_bytes() == text.encode()):
            write_text(path, text)
