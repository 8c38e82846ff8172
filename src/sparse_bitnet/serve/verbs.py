"""The verb ``generate`` of the command line."""

from __future__ import annotations

from pathlib import Path

import tyro

from sparse_bitnet.packed.load import DType, load_with_tokenizer
from sparse_bitnet.serve.generate import Sampling, generate_text

DEFAULT_SAMPLING = Sampling()


def generate(
    model: Path,
    prompt: str,
    *,
    max_new_tokens: int = 200,
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = DEFAULT_SAMPLING,
    dtype: DType | None = None,
    device: str | None = None,
    compile: bool = False,
) -> None:
    """Print a prompt and its continuation, streaming the text to the terminal.

    Args:
        model: directory of the model and its tokenizer, or a GGUF file.
        prompt: the text to continue.
        max_new_tokens: stop after so many.
        sampling: how the next token is chosen.
        dtype: to compute in; the stored one when left out.
        device: the GPU when left out, if there is one.
        compile: on a GPU, compile the decoder first: fewer kernels a token, for long texts.
    """
    loaded, tokenizer = load_with_tokenizer(model, dtype=dtype, device=device, compile=compile)
    before = prompt  # shown with the first piece, when nothing is left to be refused

    def write(text: str) -> None:
        nonlocal before
        print(before + text, end="", flush=True)
        before = ""

    generate_text(loaded, tokenizer, prompt, max_new_tokens, sampling, write)
    print()
