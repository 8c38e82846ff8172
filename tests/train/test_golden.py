"""Fifty losses of a tiny run, committed: nobody changes the method without noticing.

``python tests/train/test_golden.py`` writes the files anew, after a change that is meant.

How tight can it be? The same code on another CPU sums in another order. For some steps that changes
the last bit; then a weight at the edge of rounding or of a mask falls to the other side, and the
losses part for good. Measured here, against AVX-512 with one thread: AVX2 and plain SSE, each in
PyTorch, MKL and oneDNN, differ by at most 4e-3 and on average by 1e-3 (bitnet), while the smallest
change of the method, 7:8 or dense instead of 6:8, differs by 7.5e-3 on average. Hence 2.5e-3 on
average, and 1e-2 at any step. Before the first update nothing has parted yet: 1e-5.
"""

import json
import sys
from pathlib import Path

import pytest

from sparse_bitnet.train import train

GOLDEN = Path(__file__).parents[1] / "golden"
SECTIONS = {
    "tiny_bitnet_6of8": {"sparsity": {"kind": "bitnet"}},
    "tiny_bf16_6of8": {"sparsity": {"kind": "bf16"}},
}


def fifty_losses(recipe, **sections):
    result = train(recipe("golden", schedule={"steps": 50}, **sections))
    rows = [json.loads(line) for line in result.history.read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def distance(ours, golden):
    """Of the first loss, on average, and the largest."""
    gaps = [abs(a - b) for a, b in zip(ours, golden, strict=True)]
    return gaps[0], sum(gaps) / len(gaps), max(gaps)


def committed(name):
    losses = json.loads((GOLDEN / f"{name}.json").read_text())["losses"]
    return losses


@pytest.mark.parametrize("name", SECTIONS)
def test_losses_are_the_committed_ones(recipe, name):
    first, average, largest = distance(fifty_losses(recipe, **SECTIONS[name]), committed(name))
    assert first < 1e-5
    assert average < 2.5e-3
    assert largest < 1e-2


@pytest.mark.parametrize(
    "sparsity",
    [{"pattern": "7:8"}, {"pattern": "dense"}, {"method": {"gradient": "masked"}}],
    ids=["7:8", "dense", "masked gradient"],
)
def test_small_changes_of_the_method_are_noticed(recipe, sparsity):
    losses = fifty_losses(recipe, sparsity=sparsity)
    first, average, _ = distance(losses, committed("tiny_bitnet_6of8"))
    assert average > 5e-3
    assert first > 1e-4 or "method" in sparsity  # a gradient's change shows one step later


def main():
    import tempfile

    import torch

    sys.path.insert(0, str(Path(__file__).parent))
    from conftest import Recipes, write_tokens

    torch.set_num_threads(1)
    for name, sections in SECTIONS.items():
        with tempfile.TemporaryDirectory() as directory:
            tokens = Path(directory) / "tokens"
            write_tokens(tokens / "train", 20_000, seed=1)
            write_tokens(tokens / "validation", 3_000, seed=2)
            losses = fifty_losses(Recipes(tokens, Path(directory)), **sections)
        values = {"run": sections, "steps": 50, "losses": losses}
        (GOLDEN / f"{name}.json").write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
