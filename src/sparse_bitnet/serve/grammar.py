"""Answers that are JSON, of a schema if one is given, through llguidance (extra ``json``)."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from sparse_bitnet.serve.requests import Form, InvalidRequest

ANY_OBJECT = {"type": "object"}
SPACES: Any = {"whitespace_pattern": " ?"}
"""Between values; a small model that may write any number of them writes nothing else."""


class Grammars:
    """Compiles what requests ask for as ``response_format``, for a model of ``vocabulary`` logits
    whose answers end with one of the ids ``eos``."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, eos: set[int]) -> None:
        self._tokenizer, self._vocabulary, self._eos = tokenizer, vocabulary, eos

    def matcher(self, form: Form | None) -> Any:
        """An ``LLMatcher`` before its first token; None where text is asked for.

        Raises:
            InvalidRequest: for a schema that cannot be followed, or without llguidance.
        """
        if form is None or form.type == "text":
            return None
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise InvalidRequest(
                f"response_format {form.type} needs, where the server runs: "
                "pip install 'sparse-bitnet[json]'"
            ) from None
        schema = ANY_OBJECT if form.json_schema is None else form.json_schema.schema
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=SPACES)
        wrong = LLMatcher.validate_grammar(grammar, self._vocabulary_tree)
        if wrong:
            raise InvalidRequest(f"response_format: the schema cannot be followed: {wrong[:300]}")
        return LLMatcher(self._vocabulary_tree, grammar)

    @cached_property
    def _vocabulary_tree(self) -> Any:
        """Tokens as bytes, as llguidance walks them; made once, in up to a second."""
        import llguidance.hf

        try:
            return llguidance.hf.from_tokenizer(
                self._tokenizer,  # type: ignore[arg-type]  # a fast one
                n_vocab=self._vocabulary,
                eos_token=sorted(self._eos) or None,
            )
        except Exception as error:  # whatever it does not know of a tokenizer
            raise InvalidRequest(
                "response_format: llguidance cannot read this model's tokenizer: "
                f"{str(error)[:200]}"
            ) from None
