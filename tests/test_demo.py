"""The main job, made small: trains, measures, packs, loads, compares, says what it reuses."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from sparse_bitnet import demo
from sparse_bitnet.core import SparseBitNetError


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


def run(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[str, str]:
    monkeypatch.setattr(demo, "prepare", partial(demo.prepare, max_bytes=300_000))
    monkeypatch.setattr(demo, "VOCABULARY", 512)
    monkeypatch.setattr(demo, "STEPS", 4)
    monkeypatch.setattr(demo, "SEQUENCE", 32)
    monkeypatch.setattr(demo, "PRESET", "tiny")
    demo.demo(directory)
    shown = capsys.readouterr()
    return shown.out, shown.err


def test_the_whole_way_and_a_second_run(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = run(small, monkeypatch, capsys)
    for name in demo.MODELS:
        assert out.count(name) >= 1
    assert "max |Δlogit| 0.0e+00 in fp32, same greedy text" in out
    assert "packed, two-bit" in out and "packed, trits" in out
    assert (small / "packed-two-bit" / "model.safetensors").is_file()
    assert "reusing it" not in err
    again, told = run(small, monkeypatch, capsys)
    assert told.count("reusing it") == len(demo.MODELS)
    assert again.split("Done in")[0] == out.split("Done in")[0]


def test_a_packed_model_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fixed(torch.nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.logits = torch.full((1,), value)

        def forward(self, ids: torch.Tensor) -> Fixed:
            return self

    class Tokens:
        def tokens(self, start: int, count: int) -> object:
            return torch.zeros(count).numpy()

    with pytest.raises(SparseBitNetError, match=r"differ .* by 1\.00e-03, more than 1e-04"):
        demo.compare(Fixed(0.0), Fixed(1e-3), None, Tokens())  # type: ignore[arg-type]
