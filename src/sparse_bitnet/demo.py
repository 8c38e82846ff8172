"""The verb ``demo``: train, measure, pack and run a small ternary N:M model, from text on.

The text is one that every machine has: the sources of Python's own standard library. Everything is
written below one directory, and a second run reuses what the first one finished.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from sparse_bitnet.console import out, say
from sparse_bitnet.core import SparseBitNetError
from sparse_bitnet.data import TokenShards, prepare
from sparse_bitnet.evaluate import Perplexity, perplexity
from sparse_bitnet.packed.sizes import readable_bytes
from sparse_bitnet.packed.write import PackResult, pack
from sparse_bitnet.serve.generate import Sampling, generate_text
from sparse_bitnet.train import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    SparsityConfig,
    TrainConfig,
    load_trained,
    train,
)

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


def demo(directory: Path = Path("runs/demo")) -> None:
    """Train a small 6:8 Sparse-BitNet and its baselines, measure them, pack the first and run it.

    Args:
        directory: where everything is written; what is finished there is reused.
    """
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
            storage: pack(models[SPARSE], directory / f"packed-{storage}", storage=storage)
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
    out.print(sizes(packed))
    out.print("\nThe packed model writes Python:\n")
    drawn = Sampling(temperature=0.7, top_k=40)
    out.print(PROMPT + generate_text(model, tokenizer, PROMPT, SAMPLE_TOKENS, drawn), markup=False)
    out.print(f"\nEverything is in {directory}:", markup=False)
    for what, where in {"tokens": directory / "data", **models, "packed": runs}.items():
        out.print(f"  {what:18} {where}", markup=False)
    out.print(f"\nDone in {time.perf_counter() - started:.0f} s. Next:", markup=False)
    out.print(f"  sparse-bitnet generate {runs} 'import '", markup=False)
    out.print(f"  sparse-bitnet inspect {runs}", markup=False)


def trained_directory(config: TrainConfig) -> Path:
    directory = train(config).model_directory
    assert directory is not None  # run.export is on
    return directory


def recipe(directory: Path, sparsity: SparsityConfig) -> TrainConfig:
    """The same data, steps and seed for every model; only the linears and their rate differ."""
    name = f"{sparsity.kind}-{sparsity.pattern.replace(':', '-')}"
    return TrainConfig(
        data=DataConfig(path=str(directory / "data"), sequence_length=SEQUENCE, batch_size=BATCH),
        model=ModelConfig(source=PRESET),
        sparsity=sparsity,
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE[sparsity.kind]),
        schedule=ScheduleConfig(steps=STEPS),
        run=RunConfig(
            directory=str(directory / name), checkpoint_every=STEPS // 2, precision="fp32"
        ),
    )


def measure(model: PreTrainedModel, held_out: TokenShards) -> Perplexity:
    return perplexity(model, held_out, window=SEQUENCE, stride=SEQUENCE)


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


def quality(measured: dict[str, Perplexity]) -> Table:
    table = Table("model", "perplexity", "bits/byte", title="Held-out text", title_justify="left")
    for name, result in measured.items():
        table.add_row(name, f"{result.perplexity:.2f}", f"{result.bits_per_byte:.3f}")
    return table


def sizes(packed: dict[str, PackResult]) -> Table:
    table = Table("stored as", "ternary weights", "bits a weight", "whole model", title="Sizes")
    table.title_justify = "left"
    one = next(iter(packed.values()))
    table.add_row("fp32", readable_bytes(4 * one.weights), "32", readable_bytes(one.float32_bytes))
    for storage, result in packed.items():
        whole = result.packed_bytes + result.other_bytes
        table.add_row(
            f"packed, {storage}",
            readable_bytes(result.packed_bytes),
            f"{result.bits_per_weight:.2f}",
            f"{readable_bytes(whole)} (embeddings {readable_bytes(result.other_bytes)} in fp32)",
        )
    return table


@contextmanager
def part(title: str) -> Iterator[None]:
    """A heading, and how long the part took."""
    say(f"\n── {title}")
    started = time.perf_counter()
    yield
    say(f"   {time.perf_counter() - started:.0f} s")
