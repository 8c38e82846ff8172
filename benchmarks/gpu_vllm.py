"""Packed models in vLLM beside BF16 and FP8: tokens a second, time to first token, memory.

    python benchmarks/gpu_vllm.py --kinds bf16 6:8 --concurrency 1 32 256 --minutes 9

The shape is Qwen2.5-7B's, with random weights: packed directories are made here, BF16 and FP8 are
vLLM's dummies. Each request has 512 prompt tokens and gets 128 new ones; tokens a second are those
of steps in which all requests advance. ``prefill`` is four prompts of 4,096 tokens. vLLM finds the
plugin through the package's metadata, so the package has to be installed. Every row is written at
once: ``results/<gpu>/vllm.json``, where rows of the same kind and concurrency are replaced. Runs of
one kind were up to a fifth apart, so what is compared has to be of one run:
``vllm_patterns.json`` beside it is the file of ``--kinds 6:8 2:4 dense``. With ``--gpus 2``
matrices are cut over two of them (kind ``6:8, 2 GPUs``); the tokens that one request gets stand in
its row, to be held beside one GPU's, with the two likeliest of each step and their log
probabilities.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import gpu_common

SHAPE: dict[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
KINDS = ("bf16", "fp8", "dense", "6:8", "2:4")
CONCURRENCY = (1, 8, 32, 64, 128, 256)
PROMPT, NEW, PREFILL = 512, 128, (4, 4096)
CAPTURED = [1, 2, 4, 8, 16, 32, 64, 128, 256]


def write_model(directory: Path, kind: str, layers: int) -> None:
    """A directory of that kind: a config alone, or a whole packed model of random weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from sparse_bitnet.core import DENSE, Pattern
    from sparse_bitnet.nn.pack import swap_packed
    from sparse_bitnet.nn.packed_module import PackedSpec
    from sparse_bitnet.packed.config import SparseBitNetConfig
    from sparse_bitnet.packed.tensor_file import write_tensors

    config = Qwen2Config(**{**SHAPE, "num_hidden_layers": layers}, dtype="bfloat16")
    config.architectures = ["Qwen2ForCausalLM"]
    if kind in ("bf16", "fp8"):
        config.save_pretrained(directory)
        return
    pattern = DENSE if kind == "dense" else Pattern.parse(kind)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    specs = {
        name: PackedSpec("two-bit", pattern)
        for name, module in model.model.named_modules(prefix="model")
        if isinstance(module, torch.nn.Linear)
    }
    swap_packed(model, specs)
    config.quantization_config = SparseBitNetConfig.of(specs, [])
    config.save_pretrained(directory)
    state = model.state_dict()
    tensors = {
        name: random_tensor(name, tensor.dtype, tuple(tensor.shape), pattern).cpu()
        for name, tensor in state.items()
    }
    write_tensors(directory / "model.safetensors", tensors)
    torch.cuda.empty_cache()


def random_tensor(name: str, dtype: torch.dtype, shape: tuple[int, ...], pattern: Any) -> Any:
    """Weights that keep the pattern, and scales that keep activations near one."""
    from sparse_bitnet.formats import two_bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == torch.uint8:
        ternary = torch.randint(0, 2, (shape[0], 4 * shape[1]), dtype=torch.int8, device=device)
        ternary = 2 * ternary - 1
        if pattern.is_dense:
            ternary *= torch.rand(ternary.shape, device=device) > 1 / 3
        else:
            order = torch.rand(ternary.shape, device=device).unflatten(-1, (-1, pattern.m))
            ternary *= (order.argsort(-1) < pattern.n).flatten(-2)
        return two_bit.pack_rows(ternary)
    if name.endswith("weight_scale"):
        return torch.full(shape, SHAPE["hidden_size"] ** -0.5)
    if "norm" in name:
        return torch.ones(shape, dtype=dtype)
    return torch.randn(shape, device=device).mul_(0.02).to(dtype)


def parameter_bytes(model: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def measure(kind: str, concurrency: list[int], layers: int, gpus: int, out: Path) -> None:
    """One engine; a row for prefill, then one for each concurrency."""
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # for apply_model alone
    from vllm import LLM

    with tempfile.TemporaryDirectory() as directory:
        start = time.perf_counter()
        write_model(Path(directory), kind, layers)
        print(f"{kind}: written in {time.perf_counter() - start:.0f} s", flush=True)
        dummy: dict[str, Any] = {"load_format": "dummy"} if kind in ("bf16", "fp8") else {}
        llm = LLM(
            directory,
            **dummy,
            quantization="fp8" if kind == "fp8" else None,
            tensor_parallel_size=gpus,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=8192,
            max_num_seqs=256,
            enable_prefix_caching=False,
            gpu_memory_utilization=0.85,
            compilation_config={"cudagraph_capture_sizes": CAPTURED},
        )
    # By its importable name: the engine is another process, with another ``__main__``.
    weights = max(llm.apply_model(importlib.import_module("gpu_vllm").parameter_bytes))
    print(f"{kind}: started in {time.perf_counter() - start:.0f} s", flush=True)
    kind = kind if gpus == 1 else f"{kind}, {gpus} GPUs"
    requests(llm, 2, 64, 8)
    requests(llm, *PREFILL, 1)
    requests(llm, max(concurrency), 64, 4)
    requests(llm, 1, PROMPT, 4)
    _, last, _ = requests(llm, *PREFILL, 1)
    tokens = PREFILL[0] * PREFILL[1]
    add_row(out, kind, "prefill", tokens / last[-1], last, weights)
    for count in concurrency:
        steps, first, made = requests(llm, count, PROMPT, NEW)
        rate = count / statistics.median(steps)
        row = add_row(out, kind, count, rate, first, weights)
        if count == 1:
            add(out, {**row, "tokens": made, "best_two": best_two(llm)})


def prompts(count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    shape = (count, length)
    found: list[list[int]] = torch.randint(
        10, SHAPE["vocab_size"] - 10, shape, generator=generator
    ).tolist()
    return found


def best_two(llm: Any) -> list[dict[int, float]]:
    """Log probabilities of the two likeliest tokens at each of the first steps of one request."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        max_tokens=NEW, temperature=0, ignore_eos=True, detokenize=False, logprobs=2
    )
    (answer,) = llm.generate({"prompt_token_ids": prompts(1, PROMPT)[0]}, sampling)
    return [
        {token: found.logprob for token, found in step.items()}
        for step in answer.outputs[0].logprobs
    ]


def requests(
    llm: Any, count: int, prompt: int, new: int
) -> tuple[list[float], list[float], list[int]]:
    """Seconds of the steps in which all requests advance and to each one's first token, and the
    tokens of one of them."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    sampling = SamplingParams(
        max_tokens=new,
        temperature=0,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    start = time.perf_counter()
    for index, ids in enumerate(prompts(count, prompt)):
        engine.add_request(f"{start}-{index}", {"prompt_token_ids": ids}, sampling)
    first: dict[str, float] = {}
    steps, before, was_full, tokens = [], start, False, list[int]()
    while engine.has_unfinished_requests():
        outputs, now, made = engine.step(), time.perf_counter(), 0
        for output in outputs:
            made += len(output.outputs[0].token_ids)
            first.setdefault(output.request_id, now - start)
            if output.request_id.endswith("-0"):
                tokens += output.outputs[0].token_ids
        if made:
            if was_full and made == count:
                steps.append(now - before)
            before, was_full = now, made == count
    return steps, sorted(first.values()), tokens


def add_row(
    out: Path,
    kind: str,
    concurrency: int | str,
    rate: float,
    first: list[float],
    weights: int,
) -> dict[str, Any]:
    row = {
        "kind": kind,
        "concurrency": concurrency,
        "tokens_per_second": round(rate, 1),
        "ttft_ms": round(1e3 * statistics.median(first), 2),
        "weights_gib": round(weights / 2**30, 3),
    }
    print(json.dumps(row), flush=True)
    add(out, row)
    return row


def add(out: Path, row: dict[str, Any]) -> None:
    path = out / "vllm.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    same = (row["kind"], row["concurrency"])
    rows = [other for other in rows if (other["kind"], other["concurrency"]) != same]
    gpu_common.write("vllm", [*rows, row], out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--concurrency", nargs="+", type=int, default=list(CONCURRENCY))
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--gpus", type=int, default=1, help="tensor parallelism; memory is of one")
    parser.add_argument("--minutes", type=float, help="end after this time")
    parser.add_argument("--out", type=Path, help="directory of vllm.json")
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    if options.one:
        name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
        out = options.out or gpu_common.RESULTS / name.lower().replace(" ", "-")
        measure(options.one, options.concurrency, options.layers, options.gpus, out)
        return
    end = time.monotonic() + 60 * (options.minutes or 10_000)
    for kind in options.kinds:
        command = [sys.executable, __file__, *sys.argv[1:], "--one", kind]
        child = subprocess.Popen(command, start_new_session=True)
        try:
            child.wait(end - time.monotonic())
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # the engine is a process of its own
            sys.exit(f"{kind}: no time left; its rows so far are written")
        if child.returncode:
            print(f"{kind}: failed with {child.returncode}", flush=True)


if __name__ == "__main__":
    main()
