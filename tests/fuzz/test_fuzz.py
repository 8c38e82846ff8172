"""Ten thousand damaged files, and none of them does worse than an error of ours. See engine.py."""

import json
from pathlib import Path

import engine
import pytest

from processes import Started

READERS = sorted(p.stem.removeprefix("reader_") for p in Path(__file__).parent.glob("reader_*.py"))
FAST, SLOW = 200, 10_000
SHARE = -(-FAST // len(READERS))
SLOW_SHARE = -(-(SLOW - FAST) // len(READERS))


def run(tmp_path, *orders):
    """What the engine tells; fails with the seed at work if its process did not end well."""
    out = tmp_path / "told.jsonl"
    done = Started(tmp_path, engine.main, (str(out), *orders))
    done.join()
    told = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    at = next((event["at"] for event in reversed(told) if "at" in event), "nothing")
    assert done.exitcode == 0, f"the process died at seed {at}:\n{done.complained()[-3000:]}"
    return told


def judge(told, readers):
    failures = [event for event in told if "failure" in event]
    texts = [f"{event['failure']}\n{event['detail']}" for event in failures[:5]]
    assert not failures, f"{len(failures)} failures, the first of them:\n" + "\n".join(texts)
    finished = {event["finished"]: event for event in told if "finished" in event}
    assert sorted(finished) == readers
    for name, event in finished.items():
        assert event["refused"], f"{name}: nothing was ever refused, so nothing was tested"
        assert event["loaded"], f"{name}: nothing was ever loaded, so nothing was tested"


def test_two_hundred_mutations(tmp_path):
    orders = [f"{name}:0:{SHARE}" for name in READERS]
    judge(run(tmp_path, *orders), READERS)


CARELESS = """
import json, pickle

NAMED = True  # no pipes, each of which takes ten seconds to find out

def build(directory):
    (directory / "value.json").write_text('{"file": "value.json", "size": 1}')

def read(directory, mutation):
    data = (directory / "value.json").read_bytes()
    try:
        pickle.loads(data)
    except Exception:
        pass
    value = json.loads(data)
    size = value["size"]
    if isinstance(size, int) and 2**31 <= size <= 2**40:
        bytes(size)
    open(directory / value["file"]).read()
"""


def test_a_careless_reader_is_found_out(tmp_path):
    """Each of the things that must not happen is seen when it does."""
    reader = tmp_path / "reader_careless.py"
    reader.write_text(CARELESS)
    told = run(tmp_path, f"{reader}:0:800")
    failures = [str(event["failure"]) for event in told if "failure" in event]
    for what in (
        "not an error of ours: KeyError",
        "not an error of ours: JSONDecodeError",
        "not an error of ours: MemoryError",
        "code from the files ran",
        "opened ",
    ):
        assert any(what in failure for failure in failures), what


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", READERS)
def test_ten_thousand_mutations(tmp_path, name):
    judge(run(tmp_path, f"{name}:{SHARE}:{SLOW_SHARE}"), [name])
