"""The verb ``kernels`` on a machine without a GPU."""

import pytest
import torch

from sparse_bitnet.core import ConfigError, PatternError
from sparse_bitnet.kernels import native
from sparse_bitnet.kernels.explain import explain


def test_covers_all_it_was_asked() -> None:
    explanation = explain(("16x32", "8x64"), (1, 9), ("6:8", "dense"), "cpu")
    assert [row[:3] for row in explanation.rows] == [
        (shape, name, tokens)
        for shape in ("16x32", "8x64")
        for name in ("6:8", "dense")
        for tokens in (1, 9)
    ]
    backend = "cpu" if native.available() else "reference"
    assert all(row[3].backend == backend for row in explanation.rows)
    assert str(explanation) == (f"cpu: every layer is served by {backend} ({native.explanation()})")
    with pytest.raises(PatternError, match="layer 8x12"):
        explain(("8x12",), (1,), ("6:8",), "cpu")
    with pytest.raises(ConfigError, match="write OUTxIN"):
        explain(("8,16",), (1,), ("6:8",), "cpu")
    with pytest.raises(ConfigError, match="tokens 0 is no count"):
        explain(("8x16",), (1, 0), ("6:8",), "cpu")
    with pytest.raises(ConfigError, match="device 'cudaa' cannot be used here"):
        explain(("8x16",), (1,), ("6:8",), "cudaa")


def test_says_that_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert str(explain(("8x16",))).startswith("cpu (no NVIDIA GPU here): every layer is served by")
