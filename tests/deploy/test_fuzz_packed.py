"""Random damage to a packed directory: always an error of ours, never a crash or random weights.

A mutation may also leave the directory meaning the same (a space in a JSON file); then it has to
load and compute exactly what it did.
"""

import json
import random
import resource
import shutil
import struct

import pytest
import torch

from sparse_bitnet.core import SparseBitNetError
from sparse_bitnet.deploy.packing import pack
from sparse_bitnet.deploy.pretrained import load_packed

FAST, SLOW = 200, 3000
MEMORY = 2**30  # more than the process needs for any tiny model, less than any blow-up
GIANT = [2**31, 2**40, 2**63 - 1, 2**63, 2**64, -1, 0, 1.5, "8", None, [], {}]
PATHS = ["../x.safetensors", "/etc/passwd", "a/../../b", "model.bin", "", ".", "\x00", "~/x"]


@pytest.fixture(scope="module")
def target(tmp_path_factory, trained, logits):
    """A directory of two shards, and what its model computes."""
    root = tmp_path_factory.mktemp("fuzz")
    model = trained("qwen2")
    pack(model, root / "clean", shard_bytes=40_000)
    for name in ("hf_plugin.py", "generation_config.json"):
        (root / "clean" / name).unlink()
    return root, logits(model)


@pytest.mark.parametrize("part", range(4))
def test_two_hundred_mutations(target, logits, part):
    fuzz(target, logits, range(part * FAST // 4, (part + 1) * FAST // 4))


@pytest.mark.slow
def test_thousands_of_mutations(target, logits):
    fuzz(target, logits, range(FAST, FAST + SLOW))


def fuzz(target, logits, seeds):
    root, expected = target
    refused = 0
    for seed in seeds:
        directory = root / "damaged"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(root / "clean", directory)
        what = mutate(random.Random(seed), directory)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            model = load_packed(directory)
            found = logits(model)
        except SparseBitNetError as error:
            refused += 1
            assert len(str(error)) < 2000, f"seed {seed}: {what}"
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {what}: not an error of ours") from error
        else:
            harmless = what.startswith("config") or torch.equal(found, expected)
            assert harmless, f"seed {seed}: {what}: loaded, and computes something else"
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        assert grown < MEMORY, f"seed {seed}: {what}: {grown} bytes more memory"
    assert refused > 0.6 * len(seeds)


def mutate(rng, directory):
    """Damage one file; returns what was done."""
    kind = rng.choice([truncate, flip, flip, overwrite, header, header, index, config, rearrange])
    return f"{kind.__name__} {kind(rng, directory)}"


def any_file(rng, directory):
    return rng.choice(sorted(directory.iterdir()))


def weights(rng, directory):
    return rng.choice(sorted(directory.glob("*.safetensors")))


def truncate(rng, directory):
    path = any_file(rng, directory)
    data = path.read_bytes()
    keep = rng.randrange(len(data))
    path.write_bytes(data[:keep] if rng.random() < 0.8 else data + data[:keep])
    return f"{path.name} at {keep}"


def flip(rng, directory):
    path = weights(rng, directory)
    data = bytearray(path.read_bytes())
    places = [rng.randrange(len(data)) for _ in range(rng.choice([1, 1, 3, 50]))]
    for place in places:
        data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"{path.name} {places[:3]}"


def overwrite(rng, directory):
    path = weights(rng, directory)
    data = bytearray(path.read_bytes())
    place = rng.choice([0, 0, 8, rng.randrange(len(data))])
    giant = rng.choice([0, 1, 2**32, 2**63, 2**64 - 1, len(data), len(data) - 8])
    data[place : place + 8] = struct.pack("<Q", giant)
    path.write_bytes(data)
    return f"{path.name} {giant} at {place}"


def spoil(rng, value):
    """Change something anywhere inside a JSON value, in place."""
    places = []

    def collect(container):
        for key in container if isinstance(container, dict) else range(len(container)):
            places.append((container, key))
            if isinstance(container[key], dict | list):
                collect(container[key])

    collect(value)
    container, key = rng.choice(places)
    action = rng.choice(["set", "set", "delete", "rename", "swap"])
    old = container[key]
    if action == "swap":
        other, other_key = rng.choice(places)
        container[key], other[other_key] = other[other_key], container[key]
    elif action == "delete":
        del container[key]
    elif action == "rename" and isinstance(container, dict):
        container[f"{key}x"] = container.pop(key)
    else:
        container[key] = rng.choice([*GIANT, *PATHS, "F64", "U8", "I64", "9:8", "2:4"])
    return f"{action} {key!r} (was {str(old)[:40]})"


def header(rng, directory):
    path = weights(rng, directory)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    value = json.loads(data[8 : 8 + length])
    what = spoil(rng, value)
    text = json.dumps(value).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return f"{path.name} {what}"


def edit(rng, path):
    value = json.loads(path.read_text())
    what = spoil(rng, value)
    path.write_text(json.dumps(value))
    return what


def index(rng, directory):
    return edit(rng, directory / "model.safetensors.index.json")


def config(rng, directory):
    return edit(rng, directory / "config.json")


def rearrange(rng, directory):
    """Files of the directory under each other's names, or missing."""
    one, two = rng.sample(sorted(directory.iterdir()), 2)
    data = one.read_bytes(), two.read_bytes()
    if rng.random() < 0.5:
        one.write_bytes(data[1])
        two.write_bytes(data[0])
        return f"swapped {one.name} and {two.name}"
    one.unlink()
    return f"removed {one.name}"
