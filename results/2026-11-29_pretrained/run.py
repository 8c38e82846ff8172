"""Train SmolLM2-135M to ternary 6:8 and its baselines, side by side; one JSON line a finished cell.

    python run.py model SmolLM2-135M-Instruct.Q4_1.gguf data/tokenizer model
    python run.py run model data out --tokens 20e6 --per-gpu 4

The first writes the dequantized model as an ordinary directory. The second trains the cells below,
each in a process of its own, and appends to ``out/rows.jsonl`` as they end; a cell that has a row
there is not run again. ``data`` is what ``sparse-bitnet data prepare`` wrote with the model's own
tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

import torch
from transformers import PreTrainedModel

from sparse_bitnet.data import open_source
from sparse_bitnet.evaluate.cloze import cloze_accuracy, cloze_items
from sparse_bitnet.export.gguf.read import import_gguf
from sparse_bitnet.kernels.environment import environment
from sparse_bitnet.nn import frozen
from sparse_bitnet.train import train
from sparse_bitnet.train.batches import Batches
from sparse_bitnet.train.loss import CausalLoss
from sparse_bitnet.train.model import build_model
from sparse_bitnet.train.monitor import read_history
from sparse_bitnet.train.parallel import ranks
from sparse_bitnet.train.recipe import load_recipe, to_dict

HERE = Path(__file__).parent
BLEND = "--sparsity.quantization.until 0.3"
TEACHER = "--teacher {model}"
UNMASKED = "--sparsity.pattern dense"
BF16 = "--sparsity.kind bf16 --optimizer.learning-rate 3e-4"
CELLS = {  # in order of value; ternary 6:8 from the pretrained weights unless an option says not
    "dense": f"{BF16} {UNMASKED} --run.export",
    "blend-teacher": f"{BLEND} {TEACHER}",
    "plain": "",
    "blend": BLEND,
    "random": "--model.source {model}/config.json --optimizer.learning-rate 3e-3",
    "mask": BF16,
    "mask-teacher": f"{BF16} {TEACHER}",
    "teacher": TEACHER,
    "unmasked-blend-teacher": f"{UNMASKED} {BLEND} {TEACHER}",
    "unmasked-blend": f"{UNMASKED} {BLEND}",
    "blend-tuned": f"{BLEND} --teacher {{cells}}/dense/model",  # the dense cell teaches
    "blend-tuned-2e-3": f"{BLEND} --teacher {{cells}}/dense/model --optimizer.learning-rate 2e-3",
    "blend-teacher-subln": f"{BLEND} {TEACHER} --model.sub-norms",
    "dense-teacher": f"{BF16} {UNMASKED} {TEACHER}",
    "blend-teacher-2e-3": f"{BLEND} {TEACHER} --optimizer.learning-rate 2e-3",
    "blend-teacher-4e-3": f"{BLEND} {TEACHER} --optimizer.learning-rate 4e-3",
    "blend-teacher-5e-4": f"{BLEND} {TEACHER} --optimizer.learning-rate 5e-4",
    "original": "",  # not trained: what the others start from
}
NEEDS = {"blend-tuned": "dense", "blend-tuned-2e-3": "dense"}
QUESTIONS = 1000
PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Why is the sky blue?",
)


def write_model(gguf: Path, tokenizer: Path, directory: Path) -> None:
    """Import a GGUF file, with the tokenizer that the data was made with.

    transformers 5.17 and 5.23 make two of one file, and a teacher's has to be the data's.
    """
    import_gguf(gguf, directory)
    shutil.copytree(tokenizer, directory, dirs_exist_ok=True)


def run(args: argparse.Namespace) -> None:
    """All cells without a row, ``per_gpu`` at once on each GPU."""
    rows = args.out / "rows.jsonl"
    args.out.mkdir(parents=True, exist_ok=True)
    done = set()
    if rows.is_file():
        done = {(r["cell"], r["seed"], r["tokens"]) for r in map(json.loads, rows.open())}
    until = time.monotonic() + 60 * args.minutes
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [*map(str, range(max(1, torch.cuda.device_count())))]
    places: Queue[str] = Queue()
    for place in gpus * args.per_gpu:
        places.put(place)
    threads = str(max(1, (os.cpu_count() or 1) // places.qsize()))

    def one(name: str) -> None:
        if name in NEEDS and (needed := futures.get(NEEDS[name])):
            needed.result()
        place = places.get()
        if time.monotonic() > until:
            print(f"{name}: not begun, out of time")
            places.put(place)
            return
        directory = args.out / "cells" / name
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        started = time.monotonic()
        try:
            with (directory / "log").open("w") as log:
                subprocess.run(
                    [sys.executable, __file__, "cell", *sys.argv[2:], "--only", name],
                    env={
                        **os.environ,
                        "CUDA_VISIBLE_DEVICES": place,
                        "OMP_NUM_THREADS": threads,
                    },
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=max(1.0, until - started),
                    check=True,
                )
            row = (directory / "row.json").read_text()
            with rows.open("a") as file:
                file.write(row + "\n")
            short = json.loads(row)
            print(
                f"{name}: loss {short['loss']:.4f}, cloze {short['cloze']:.1%}, "
                f"{time.monotonic() - started:.0f} s, {short['tokens_per_second']:,.0f} tokens/s",
                flush=True,
            )
        except (subprocess.SubprocessError, OSError) as error:
            tail = (directory / "log").read_text()[-1500:]
            print(
                f"{name}: {type(error).__name__} after {time.monotonic() - started:.0f} s\n{tail}"
            )
        finally:
            places.put(place)

    names = [n for n in args.only or CELLS if (n, args.seed, _tokens(args)) not in done]
    futures: dict[str, Future[None]] = {}
    with ThreadPoolExecutor(places.qsize()) as pool:
        for name in names:
            futures[name] = pool.submit(one, name)
    for future in futures.values():
        future.result()


def cell(args: argparse.Namespace) -> None:
    """One cell: train, measure, write its row."""
    (name,) = args.only
    cells, started = args.out / "cells", time.perf_counter()
    steps = _steps(args)
    options = CELLS[name].format(model=args.model, cells=cells).split() + args.options.split()
    shared = {
        "model.source": args.model,
        "data.path": args.data,
        "run.directory": cells / name,
        "run.seed": args.seed,
        "schedule.steps": steps,
        "run.log-every": max(1, steps // 100),
        "run.validate-every": max(1, steps // 4),
    }
    arguments = [part for key, value in shared.items() for part in (f"--{key}", str(value))]
    config = load_recipe(HERE / "recipe.yaml", [*arguments, *options])
    history: list[dict[str, Any]] = []
    if name == "original":
        model, tokenizer, loss = _original(config)
    else:
        result = train(config)
        model, tokenizer, loss = result.model, result.tokenizer, result.validation_loss
        history = read_history(result.history)
    trained = time.perf_counter() - started
    speeds = [row["tokens_per_second"] for row in history if "tokens_per_second" in row]
    row = {
        "cell": name,
        "seed": args.seed,
        "tokens": _tokens(args),
        "loss": loss,
        "train_seconds": trained,
        "tokens_per_second": statistics.median(speeds[1:] or speeds or [0.0]),
        "memory_gb": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None,
        **_measure(model, tokenizer, args),
        "config": to_dict(config),
        "environment": environment(),
        "history": [{k: v for k, v in one.items() if k != "layers"} for one in history],
    }
    row["seconds"] = time.perf_counter() - started
    (cells / name / "row.json").write_text(json.dumps(row))


def _original(config: Any) -> tuple[PreTrainedModel, Any, float]:
    """The model before training, its tokenizer, and its loss on what the others are measured on."""
    with ranks(config.run.device) as here, torch.no_grad():
        batches = Batches(config, here)
        model = build_model(
            config.model, vocab_size=batches.vocab_size, seed=0, device=here.device
        ).eval()
        loss_of = CausalLoss(model).eval()
        with torch.autocast(here.device.type, torch.bfloat16, enabled=here.device.type == "cuda"):
            losses = [loss_of(tokens)[0].float() for tokens in batches.validation()]
        return model, batches.tokenizer, torch.stack(losses).mean().item()


def _measure(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Cloze accuracy, and a few answers to read."""
    kind = model.device.type
    items = cloze_items(open_source(f"jsonl:{args.cloze}"), limit=args.questions)
    answers = []
    with (
        torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"),
        torch.compiler.set_stance("force_eager"),
        torch.no_grad(),
        frozen(model),
    ):
        accuracy = cloze_accuracy(model, tokenizer, items)
        for prompt in PROMPTS:
            message = [{"role": "user", "content": prompt}]
            given = tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).to(model.device)
            made = model.generate(**given, max_new_tokens=args.answer_tokens, do_sample=False)
            answers.append(tokenizer.decode(made[0, given["input_ids"].shape[1] :]))
    return {
        "cloze": accuracy.accuracy,
        "cloze_error": accuracy.standard_error,
        "answers": dict(zip(PROMPTS, answers, strict=True)),
    }


def _steps(args: argparse.Namespace) -> int:
    data = load_recipe(HERE / "recipe.yaml", args.options.split()).data
    return max(1, round(args.tokens / (data.batch_size * data.sequence_length)))


def _tokens(args: argparse.Namespace) -> int:
    data = load_recipe(HERE / "recipe.yaml", args.options.split()).data
    return _steps(args) * data.batch_size * data.sequence_length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parsers = parser.add_subparsers(dest="verb", required=True)
    model = parsers.add_parser("model")
    model.add_argument("gguf", type=Path)
    model.add_argument("tokenizer", type=Path)
    model.add_argument("directory", type=Path)
    for verb in ("run", "cell"):
        part = parsers.add_parser(verb)
        part.add_argument("model", type=Path)
        part.add_argument("data", type=Path)
        part.add_argument("out", type=Path)
        part.add_argument("--tokens", type=float, default=20e6)
        part.add_argument("--seed", type=int, default=0)
        part.add_argument("--per-gpu", type=int, default=4)
        part.add_argument("--minutes", type=float, default=9.0)
        part.add_argument("--only", nargs="+", choices=CELLS)
        part.add_argument("--cloze", type=Path, required=True, help="held-out documents, JSONL")
        part.add_argument("--questions", type=int, default=QUESTIONS)
        part.add_argument("--answer-tokens", type=int, default=40)
        part.add_argument("--options", default="", help="of `sparse-bitnet train`, for all cells")
    args = parser.parse_args()
    if args.verb == "model":
        write_model(args.gguf, args.tokenizer, args.directory)
    else:
        (run if args.verb == "run" else cell)(args)


if __name__ == "__main__":
    main()
