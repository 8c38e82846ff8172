"""Commands killed (SIGKILL) at random moments, over and over: the end is as if nothing had been.

``pytest -m slow tests/test_kills.py -s`` prints how often each was killed.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from sparse_bitnet.nn import convert
from sparse_bitnet.train import SparsityConfig, save_trained
from sparse_bitnet.train.presets import preset_config

KILLS = 10
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
# Times differ; dead weights are counted by windows of readings that one process has seen whole.
NOT_REPEATED = {"tokens_per_second", "seconds", "dead"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def all_files(out):
    found = [path for path in out.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(out)): sha256(path) for path in found}


def trained(out):
    """The weights and the history, but for :data:`NOT_REPEATED`."""
    weights = {path.name: sha256(path) for path in (out / "model").glob("*.safetensors")}
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for figures in (row, *row.get("layers", {}).values()):
            for name in NOT_REPEATED & figures.keys():
                del figures[name]
    return weights | {"history": rows}


def start(arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "sparse_bitnet", *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def kill_over_and_over(arguments, work):
    """Kill the command until it has been killed often enough, then let it end.

    Killed while it works: at a random time after something in ``work`` changed. A command that
    ended first starts anew on what is there.
    """
    rng, kills, ends = random.Random(0), 0, 0
    while kills < KILLS and ends < 3:
        before = newest(work)
        process = start(arguments)
        while process.poll() is None and newest(work) == before:
            time.sleep(0.002)
        time.sleep(rng.expovariate(4.0))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        else:
            ends += 1
        _, err = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), err.decode()[-2000:]
    process = start(arguments)
    _, err = process.communicate()
    assert process.returncode == 0, err.decode()[-2000:]
    leftovers = list(work.rglob("*.partial"))
    print(f"{arguments[0]}: killed {kills} times, ended early {ends} times, {len(leftovers)} left")
    assert kills >= 3
    assert not leftovers


def newest(directory):
    """The newest change below a directory, in nanoseconds."""
    times = [0]
    for path in [directory, *directory.rglob("*")]:
        try:
            times.append(path.stat().st_mtime_ns)
        except OSError:
            continue
    return max(times)


@pytest.fixture
def corpus(tmp_path):
    rng = random.Random(1)
    path = tmp_path / "corpus.jsonl"
    words = ["alpha", "beta", "gamma", "delta", "naïve", "数据", "x = 1\n"]
    with path.open("w") as file:
        for _ in range(6000):
            text = " ".join(rng.choices(words, k=rng.randint(20, 400)))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def prepare(corpus, out):
    arguments = ["data", "prepare", f"jsonl:{corpus}", str(out), "--vocab-size", "300"]
    return [*arguments, "--shard-tokens", "100000", "--workers", "1"]


def test_data_prepare(corpus, tmp_path):
    whole = tmp_path / "whole"
    assert start(prepare(corpus, whole)).wait() == 0
    out = tmp_path / "work" / "killed"
    out.parent.mkdir()
    kill_over_and_over(prepare(corpus, out), out.parent)
    assert all_files(out) == all_files(whole)


def test_train(corpus, tmp_path):
    assert start(prepare(corpus, tmp_path / "data")).wait() == 0
    arguments = {}
    for name in ("whole", "work/killed"):
        recipe = tmp_path / f"{name.replace('/', '-')}.yaml"
        values = {
            "data": {"path": str(tmp_path / "data"), "sequence_length": 64, "batch_size": 8},
            "schedule": {"steps": 400},
            "run": {
                "directory": str(tmp_path / name),
                "device": "cpu",
                "log_every": 2,
                "checkpoint_every": 7,
                "validate_every": 50,
                "validation_sequences": 16,
            },
        }
        recipe.write_text(yaml.safe_dump(values))
        arguments[name] = ["train", str(recipe)]
    assert start(arguments["whole"]).wait() == 0
    out = tmp_path / "work" / "killed"
    out.parent.mkdir()
    kill_over_and_over(arguments["work/killed"], out.parent)
    assert trained(out) == trained(tmp_path / "whole")


def test_pack(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(preset_config("study-5m", 8192))
    convert(model, "6:8")
    save_trained(model, None, tmp_path / "trained", SparsityConfig())
    whole, out = tmp_path / "whole", tmp_path / "work" / "killed"
    assert start(["pack", str(tmp_path / "trained"), str(whole)]).wait() == 0
    out.parent.mkdir()
    again = ["pack", str(tmp_path / "trained"), str(out), "--overwrite"]
    kill_over_and_over(again, out.parent)
    assert all_files(out) == all_files(whole)
