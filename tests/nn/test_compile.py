"""torch.compile: whole graphs, the eager losses, no recompilation when the pattern changes."""

import pytest
import torch
from torch._dynamo.utils import counters

from sparse_bitnet.core import Method
from sparse_bitnet.nn import convert, set_pattern

SCHEDULE = ["dense", "8:8", "6:8", "4:8", "2:8", "dense", "7:8"]

pytestmark = [
    pytest.mark.usefixtures("threads", "fresh_compiler"),
    pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning"),
]


def graphs():
    return counters["stats"]["unique_graphs"]


def train(model, tokens, patterns, autocast=False):
    """Losses, and the graphs compiled so far, after each step with its own pattern."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, compiled = [], []
    for pattern in patterns:
        set_pattern(model, pattern)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        compiled.append(graphs())
    return losses, compiled


@pytest.mark.parametrize("gradient", ["dense", "masked"])
@pytest.mark.parametrize("kind", ["bitnet", "bf16"])
def test_blocks_follow_a_schedule_of_patterns(tiny, tokens, kind, gradient):
    method = Method(gradient=gradient)
    eager, model = tiny(num_hidden_layers=1), tiny(num_hidden_layers=1)
    for each in (eager, model):
        convert(each, "6:8", kind=kind, method=method)
    for block in model.model.layers:
        block.compile(fullgraph=True, backend="aot_eager")
    expected, _ = train(eager, tokens, SCHEDULE)
    losses, compiled = train(model, tokens, SCHEDULE)
    assert losses == pytest.approx(expected, abs=1e-5)
    # Ternary layers never recompile; the baseline once, when its mask first comes into force.
    at_the_end = compiled[0] if kind == "bitnet" else 2 * compiled[0]
    assert compiled == [compiled[0]] * 2 + [at_the_end] * 5


def test_whole_model_under_autocast(tiny, tokens):
    eager, model = tiny(num_hidden_layers=1), tiny(num_hidden_layers=1)
    for each in (eager, model):
        convert(each, "6:8")
    model.compile(backend="aot_eager")
    expected, _ = train(eager, tokens, ["6:8"] * 3, autocast=True)
    losses, compiled = train(model, tokens, ["6:8"] * 3, autocast=True)
    assert losses == pytest.approx(expected, abs=2e-2)
    assert compiled[0] == compiled[2]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_checkpointed_blocks(tiny, tokens):
    eager, model = tiny(), tiny()
    for each in (eager, model):
        convert(each, "6:8")
        each.train()
    for block in model.model.layers:
        block.compile(fullgraph=True, backend="aot_eager")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    expected, _ = train(eager, tokens, ["6:8"] * 3)
    losses, _ = train(model, tokens, ["6:8"] * 3)
    assert losses == pytest.approx(expected, abs=1e-5)


def test_experts_run_compiled_with_graph_breaks(tiny, tokens):
    """Which experts are hit depends on the data, so the graph breaks there; results do not."""
    eager, model = (tiny("mixtral", num_hidden_layers=1, num_local_experts=2) for _ in range(2))
    for each in (eager, model):
        convert(each, "6:8")
    for block in model.model.layers:
        block.compile(backend="aot_eager")
    expected, _ = train(eager, tokens, ["6:8", "4:8"])
    losses, _ = train(model, tokens, ["6:8", "4:8"])
    assert losses == pytest.approx(expected, abs=1e-4)
