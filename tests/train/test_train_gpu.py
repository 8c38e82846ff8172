"""Training on a GPU: compiled, as a CUDA graph, in bf16."""

import json

import pytest
import torch

from sparse_bitnet.core import ConfigError
from sparse_bitnet.train import train

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def losses(result):
    rows = [json.loads(line) for line in result.history.read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def run(recipe, name, **changes):
    run = {"device": "cuda", "compile": "off", "precision": "fp32", **changes.pop("run", {})}
    return train(recipe(name, schedule={"steps": 6}, run=run, **changes))


@pytest.mark.parametrize("kind", ["bitnet", "bf16"])
class TestOnAGPU:
    pytestmark = gpu

    def test_as_on_a_cpu(self, recipe, kind):
        """Weights are drawn by another generator, so both start from a file."""
        start = run(recipe, "start", sparsity={"kind": kind}).model_directory
        changes = {"model": {"source": str(start)}, "sparsity": {"kind": kind}}
        there = run(recipe, "gpu", **changes)
        here = run(recipe, "cpu", run={"device": "cpu"}, **changes)
        assert losses(there)[0] == pytest.approx(losses(here)[0], abs=1e-4)
        assert losses(there) == pytest.approx(losses(here), abs=2e-3)

    def test_compiled(self, recipe, kind):
        eager = run(recipe, "eager", sparsity={"kind": kind})
        compiled = run(recipe, "compiled", run={"compile": "on"}, sparsity={"kind": kind})
        assert losses(compiled) == pytest.approx(losses(eager), abs=2e-3)

    @pytest.mark.parametrize("micro", [None, 4])
    def test_graph(self, recipe, kind, micro):
        changes = {
            "sparsity": {"kind": kind, "until": {0.4: "dense"}},
            "data": {"micro_batch_size": micro},
        }
        settings = {"precision": "bf16", "checkpoint_every": 4}
        plain = run(recipe, "plain", run=settings, **changes)
        graphed = run(recipe, "graphed", run=settings | {"cuda_graph": True}, **changes)
        assert losses(graphed) == pytest.approx(losses(plain), abs=2e-3)
        assert graphed.validation_loss == pytest.approx(plain.validation_loss, abs=2e-3)


def test_graphs_need_one_process_on_cuda(recipe):
    with pytest.raises(ConfigError, match=r"run\.cuda_graph needs one process on CUDA; this run"):
        train(recipe(run={"cuda_graph": True}))
