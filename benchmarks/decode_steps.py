"""What each part of decoding is worth, 7B shape, batch 1: python benchmarks/decode_steps.py

One model, the parts switched off one by one, tokens one after another: two-bit products that take
SwiGLU along, residual sum and norm and quantization in one kernel, the compiler's combined kernels,
early launches.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from gpu_common import write
from sparse_bitnet.bench import harness
from sparse_bitnet.bench.harness import capture, replay_microseconds
from sparse_bitnet.bench.inference import Case, call_of, choose_backends
from sparse_bitnet.core import Pattern
from sparse_bitnet.kernels import dispatch, early
from sparse_bitnet.kernels.platform import compile_options
from sparse_bitnet.modeling import DecoderForCausalLM

TOKENS, REPEATS = 12, 9
EARLY = {"triton.enable_pdl": True}
STEPS: dict[str, dict[str, Any]] = {
    "all": {},
    "without SwiGLU in the product": {"swiglu": False},
    "and without integers from norms": {"swiglu": False, "integers": False},
    "and without combined kernels": {"swiglu": False, "integers": False, "options": EARLY},
    "and without early launches": {
        "swiglu": False,
        "integers": False,
        "options": {},
        "early": False,
    },
}


def microseconds(decoder: DecoderForCausalLM, step: dict[str, Any]) -> list[float]:
    """Of a token, all repeats, with the parts that the step leaves on."""
    torch._dynamo.reset()
    case = Case("decode", 1, 512)
    takes = TAKES if step.get("integers", True) else _never
    launch = LAUNCH if step.get("early", True) else _off
    with (
        mock.patch.object(dispatch, "MOST_SWIGLU_TOKENS", int(step.get("swiglu", True))),
        mock.patch.object(harness, "compile_options", lambda: step.get("options", OPTIONS)),
        mock.patch.object(dispatch, "takes_integers", takes),
        mock.patch.object(early, "launch_options", launch),
    ):
        harness.compile_parts(decoder)
        choose_backends(decoder, case)
        graph = capture([call_of(decoder, case)])
    return [replay_microseconds(graph, TOKENS) / TOKENS for _ in range(REPEATS)]


OPTIONS, TAKES, LAUNCH = compile_options(), dispatch.takes_integers, early.launch_options


def _never(*_: object) -> bool:
    return False


def _off(*_: object) -> dict[str, Any]:
    return early.OFF


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pattern", default="6:8")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    options = parser.parse_args()
    torch._dynamo.config.recompile_limit = 256
    rows = []
    with torch.no_grad():
        decoder = harness.random_decoder("qwen2.5-7b", Pattern.parse(options.pattern))
        for name, step in STEPS.items():
            times = microseconds(decoder, step)
            rows.append({"step": name, "microseconds": statistics.median(times), "all": times})
            print(f"{name:34} {rows[-1]['microseconds']:8.1f} µs", flush=True)
            write("decode_steps", rows, options.out)


if __name__ == "__main__":
    main()
