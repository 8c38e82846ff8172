"""The fp8 training-curve script, a few steps of the tiny preset, the roundings emulated."""

import json

import pytest

from sparse_bitnet.data import prepare


@pytest.fixture
def script():
    pytest.importorskip("triton")
    import fp8_backward

    return fp8_backward


def test_both_curves_are_written(script, tmp_path):
    for i in range(60):
        text = "\n".join(f"line {i} of {j % 7} words " * 8 for j in range(10))
        (tmp_path / f"{i}.txt").write_text(text)
    prepare(f"text:{tmp_path}/*.txt", tmp_path / "data", vocab_size=300, validation=0.2)
    summary = script.main(
        [
            *("--data", str(tmp_path / "data"), "--preset", "tiny", "--steps", "6"),
            *("--sequences", "4", "--sequence-length", "32", "--seeds", "0"),
            *("--directory", str(tmp_path / "runs"), "--out", str(tmp_path)),
        ]
    )
    written = json.loads((tmp_path / "fp8_backward.json").read_text())["rows"]
    full, fp8, last = written
    assert (full["backward"], fp8["backward"]) == ("full", "fp8")
    assert full["loss"][0][1] == fp8["loss"][0][1]  # nothing was backward yet
    assert full["loss"] != fp8["loss"]
    assert last["summary"] == summary
    assert abs(summary["validation_loss_difference"][0]) < 0.1
    assert len(summary["training_loss_difference"]) == len(summary["steps"]) == 6
