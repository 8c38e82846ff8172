"""llama.cpp as an engine of ``cpu_inference.py``: a process of its own, without PyTorch.

    python benchmarks/cpu_llama.py MODEL.gguf THREADS

Reads lines of ``PROMPT_TOKENS NEW_TOKENS`` and answers each with seconds, as JSON. Runs in whatever
interpreter has ``llama-cpp-cffi`` (0.4.42), which wants another transformers than this package.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path


class LlamaCpp:
    """A GGUF file, loaded: seconds of a prompt, and of single tokens after it."""

    def __init__(self, file: str, threads: int) -> None:
        from llama._llama_cpp_cpu import ffi, lib  # type: ignore[import-not-found,unused-ignore]

        self.ffi, self.lib = ffi, lib
        lib.llama_backend_init()
        model = lib.llama_model_load_from_file(file.encode(), lib.llama_model_default_params())
        options = lib.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = 1024, 512, 512
        options.n_threads = options.n_threads_batch = threads
        self.context = lib.llama_init_from_model(model, options)

    def decode(self, tokens: list[int]) -> float:
        """Seconds of one batch of tokens; logits of the last."""
        started = time.perf_counter()
        ids = self.ffi.new("llama_token[]", tokens)
        if self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(ids, len(tokens))):
            raise SystemExit("llama.cpp cannot decode")
        self.lib.llama_get_logits_ith(self.context, -1)
        return time.perf_counter() - started

    def clear(self) -> None:
        self.lib.llama_kv_self_clear(self.context)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("threads", type=int)
    options = parser.parse_args()
    engine = LlamaCpp(options.file, options.threads)
    print(json.dumps({"weight_bytes": Path(options.file).stat().st_size}), flush=True)
    while command := sys.stdin.readline().split():
        prompt, new = map(int, command)
        answer = {}
        if prompt:
            engine.clear()
            answer["prefill"] = engine.decode([i * 37 % 1000 for i in range(prompt)])
        answer["decode"] = sum(engine.decode([i % 1000]) for i in range(new))
        print(json.dumps(answer), flush=True)
    os._exit(0)  # llama.cpp's destructor does not survive the interpreter's end


if __name__ == "__main__":
    main()
