import json
from pathlib import Path

import pytest

from sparse_bitnet.kernels.autotune import Memory, bucket, fastest


def test_bucket() -> None:
    tokens = [1, 2, 3, 4, 5, 8, 9, 4096, 4097]
    assert [bucket(t) for t in tokens] == [1, 2, 3, 4, 8, 8, 16, 4096, 8192]


def test_remembers_across_processes(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "gpu.json"
    first, second = Memory(path), Memory(path)
    first.put("a", {"slow": 2.0, "fast": 1.0})
    second.put("b", {"x": 3.0})  # does not undo what the other has written
    third = Memory(path)
    assert third.get("a") == {"fast": 1.0, "slow": 2.0}
    assert fastest(third.get("a") or {}) == "fast"
    assert third.keys() == ["a", "b"]
    assert third.get("c") is None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"a": 3}', '{"a": {}}', '{"a": {"x": "1"}}', '{"a": {"x": -1}}']
)
def test_a_damaged_file_counts_as_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(text)
    memory = Memory(path)
    assert memory.keys() == []
    memory.put("a", {"x": 1.0})
    assert json.loads(path.read_text()) == {"a": {"x": 1.0}}


def test_a_folder_that_cannot_be_written_costs_only_the_memory(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    memory = Memory(blocked / "gpu.json")
    memory.put("a", {"x": 1.0})
    assert memory.get("a") == {"x": 1.0}
