"""Flip rate and zeros against slow loops; the history file."""

import json
import sys

import pytest
import torch
import torch.distributed as dist

from sparse_bitnet.core import Method, MissingExtraError, Pattern, method_mask, ternarize
from sparse_bitnet.nn import convert, set_pattern
from sparse_bitnet.train.monitor import History, Monitor, read_history
from tiny_models import tiny


def kept(row, n, m):
    """The mask of one row, the obvious way."""
    mask = []
    for start in range(0, len(row), m):
        group = row[start : start + m]
        best = sorted(range(m), key=lambda i: (-abs(group[i]), i))[:n]
        mask += [i in best for i in range(m)]
    return mask


@pytest.mark.parametrize("kind", ["bitnet", "bf16"])
def test_against_loops(kind):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 5), torch.nn.Linear(8, 5), torch.nn.Linear(16, 3)
    )
    convert(model, "2:4", kind=kind, rules={"^1$": "1:4"})
    monitor = Monitor(model)
    monitor.before_step()
    before = [module.weight.detach().clone() for module in model]
    with torch.no_grad():
        for module in model:
            module.weight += 0.1 * torch.randn_like(module.weight)
    reading = monitor.after_step()
    flips = zeros = total = 0
    for index, (module, old) in enumerate(zip(model, before, strict=True)):
        n = 1 if index == 1 else 2
        pairs = [
            (a, b)
            for x, y in zip(old.tolist(), module.weight.tolist(), strict=True)
            for a, b in zip(kept(x, n, 4), kept(y, n, 4), strict=True)
        ]
        flipped = sum(a != b for a, b in pairs)
        gamma = module.weight.abs().double().mean().item()
        zero = sum(abs(w) <= gamma / 2 for row in module.weight.tolist() for w in row)
        layer = reading.layers[f"{index}.weight"]
        assert layer.flip_rate == pytest.approx(flipped / len(pairs))
        assert layer.zeros_before_mask == pytest.approx(zero / len(pairs))
        flips, zeros, total = flips + flipped, zeros + zero, total + len(pairs)
    assert flips > 0
    assert reading.flip_rate == pytest.approx(flips / total)
    assert reading.zeros_before_mask == pytest.approx(zeros / total)
    assert list(reading.layers) == ["0.weight", "1.weight", "2.weight"]


@pytest.mark.parametrize("kind", ["bitnet", "bf16"])
@pytest.mark.parametrize("order", ["quant-then-mask", "mask-then-quant"])
def test_dead_weights_against_loops(monkeypatch, kind, order):
    """Zero in the weight that is computed with at each reading of a window."""
    monkeypatch.setattr("sparse_bitnet.train.monitor.WINDOW", 3)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 5), torch.nn.Linear(12, 5))
    method = Method(order=order)
    convert(model, "2:4", kind=kind, method=method, rules={"^1$": "1:4"})
    readings = 1  # as if resumed after the first of a window, which is then not reported
    monitor = Monitor(model, readings)
    seen = [torch.zeros(5, 12, dtype=torch.bool) for _ in model]
    for _ in range(8):
        with torch.no_grad():
            for module in model:
                module.weight += 0.3 * torch.randn_like(module.weight)
        if readings % 3 == 0:
            seen = [torch.zeros(5, 12, dtype=torch.bool) for _ in model]
        monitor.before_step()
        reading = monitor.after_step()
        readings += 1
        for flags, module, pattern in zip(seen, model, ("2:4", "1:4"), strict=True):
            now = method_mask(module.weight, Pattern.parse(pattern), method)
            if kind == "bitnet":
                now = ternarize(module.weight, Pattern.parse(pattern), method)[0] != 0
            flags.logical_or_(now)
        dead = [int((~flags).sum()) for flags in seen]
        if readings in (6, 9):
            assert 0 < sum(dead) < 120
            assert [layer.dead for layer in reading.layers.values()] == [n / 60 for n in dead]
            assert reading.dead == pytest.approx(sum(dead) / 120)
        else:
            assert reading.dead is None


def test_a_window_with_two_patterns_counts_no_dead(monkeypatch):
    monkeypatch.setattr("sparse_bitnet.train.monitor.WINDOW", 2)
    model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    convert(model, "dense")
    monitor = Monitor(model)
    dead = []
    for reading in range(4):
        if reading == 1:
            set_pattern(model, "2:4")
        dead.append(monitor.after_step().dead)
    assert dead[:3] == [None] * 3
    assert dead[3] >= 0.5  # nothing moved: what the mask leaves out is dead


def test_dead_weights_of_two_ranks_that_share_the_memory(monkeypatch):
    """Each keeps half of the batches, and their sum is what one process counts."""
    monkeypatch.setattr("sparse_bitnet.train.monitor.WINDOW", 2)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 5), torch.nn.Linear(16, 3))
    convert(model, "2:4")
    alone = Monitor(model)
    alone.after_step()
    expected = [layer.dead for layer in alone.after_step().layers.values()]
    parts = []
    monkeypatch.setattr(dist, "all_reduce", lambda counts: parts.append(counts.clone()))
    for rank in range(2):
        place = (rank, 2)
        monkeypatch.setattr("sparse_bitnet.train.monitor._sharing", lambda _, place=place: place)
        monitor = Monitor(model)
        monitor.after_step()
        monitor.after_step()
        assert len(monitor._alive) == 1
    assert (sum(parts) / torch.tensor([40, 48])).tolist() == pytest.approx(expected)


def test_dense_has_no_flips_and_mixed_counts_the_masked_alone():
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(8, 4))
    convert(model, "dense")
    monitor = Monitor(model)
    monitor.before_step()
    assert monitor.after_step().flip_rate is None
    mixed = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(8, 4))
    convert(mixed, "2:4", rules={"1": "dense"})
    monitor = Monitor(mixed)
    monitor.before_step()
    with torch.no_grad():
        mixed[0].weight.copy_(mixed[0].weight.flip(-1))
        mixed[1].weight.copy_(mixed[1].weight.flip(-1))
    reading = monitor.after_step()
    assert reading.layers["1.weight"].flip_rate is None
    assert reading.flip_rate == reading.layers["0.weight"].flip_rate > 0


def test_without_a_first_half_only_zeros_are_measured():
    model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    convert(model, "2:4")
    reading = Monitor(model).after_step()
    assert reading.flip_rate is None
    assert 0 < reading.zeros_before_mask < 1


def test_the_mask_measured_is_the_method_s():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 16))
    method = Method(mask_source="quantized")
    convert(model, "4:8", method=method)
    monitor = Monitor(model)
    monitor.before_step()
    before = method_mask(model[0].weight, Pattern(4, 8), method)
    with torch.no_grad():
        model[0].weight += 0.1 * torch.randn_like(model[0].weight)
    after = method_mask(model[0].weight, Pattern(4, 8), method)
    expected = (before != after).double().mean().item()
    assert monitor.after_step().flip_rate == pytest.approx(expected)


def test_experts_have_a_scale_each():
    model = tiny("qwen2_moe", num_experts=3)
    convert(model, "4:8")
    whole = Monitor(model).after_step()
    name, experts = next((n, p) for n, p in model.named_parameters() if p.ndim == 3)
    halves = experts.chunk(2, dim=1)  # gate and up
    zero = sum(
        int((half[e].abs() <= half[e].abs().double().mean() / 2).sum())
        for half in halves
        for e in range(3)
    )
    assert whole.layers[name].zeros_before_mask == pytest.approx(zero / experts.numel())


def test_history_resumes_and_skips_what_a_crash_cut(tmp_path):
    history = History(tmp_path, 0, tensorboard=False)
    for step in (1, 2, 3):
        history.add({"step": step, "loss": 1.0 / step})
    history.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in read_history(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    history = History(tmp_path, 2, tensorboard=False)
    history.add({"step": 3, "loss": 9.0})
    history.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 0.5},
        {"step": 3, "loss": 9.0},
    ]
    assert read_history(tmp_path / "missing") == []


def test_other_ranks_write_nothing(tmp_path):
    history = History(tmp_path, 0, tensorboard=True, writes=False)
    history.add({"step": 1})
    history.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = History(tmp_path, 0, tensorboard=True)
    layers = {"a.weight": {"flip_rate": None, "zeros": 0.25}}
    history.add({"step": 5, "loss": 0.5, "pattern": "6:8", "layers": layers})
    history.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(5, 0.5)]
    assert [(e.step, e.value) for e in events.Scalars("zeros/a.weight")] == [(5, 0.25)]


def test_missing_tensorboard_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'sparse-bitnet\[track\]'"):
        History(tmp_path, 0, tensorboard=True)
