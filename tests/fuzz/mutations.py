"""Ways to damage a directory of files, drawn by a seeded generator."""

from __future__ import annotations

import json
import os
import pickle
import struct
from dataclasses import dataclass, field
from pathlib import Path

NUMBERS = [0, -1, 1, 1.5, 2**31, 2**40, 2**63 - 1, 2**63, 2**64, 10**400, 1e308, float("inf")]
ODD = [
    *NUMBERS,
    float("nan"),
    "8",
    "",
    None,
    True,
    [],
    {},
    [[]],
    "9:8",
    "2:4",
    "F64",
    "U8",
    "é\x00",
]
PATHS = ["../secret/x", "/etc/passwd", "a/../../b", "model.bin", ".", "..", "\x00", "~/x", "//x/y"]
CODE = ["code.Own", "secret--code.Own", "os.system", ["code.Own", "code.Own"], "builtins.eval"]
WORDS = [8, 4, 2, 1]


@dataclass
class Mutation:
    """What was done to a copy.

    Attributes:
        told: for messages.
        touched: names of the damaged files, relative to the directory.
    """

    told: str
    touched: set[str] = field(default_factory=set)


@dataclass
class Sandbox:
    """Where a reader's files are, and what must not happen around them."""

    root: Path
    named: bool = False
    """Whether a person names the very files, not their directory."""

    @property
    def clean(self):
        return self.root / "clean"

    @property
    def damaged(self):
        return self.root / "place" / "damaged"

    @property
    def secret(self):
        """A directory beside the damaged one, with the same files."""
        return self.root / "place" / "secret"

    @property
    def trace(self):
        """Made by the code that the damaged files bring along, should it run."""
        return self.root / "trace"


class Payload:
    """A pickle of it runs code when it is read."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def mutate(rng, box):
    """Damage one or two files of ``box.damaged``."""
    ways = [truncate, flip, flip, overwrite, replace, rearrange, special]
    files = [path for path in sorted(box.damaged.rglob("*")) if path.is_file()]
    for suffix, way in BY_SUFFIX.items():
        if any(path.suffix == suffix for path in files):
            ways += [way] * 4
    mutation = Mutation("")
    for _ in range(rng.choice([1, 1, 1, 2])):
        way = rng.choice(ways)
        try:
            path, what = way(rng, box)
        except Exception:  # what the first mutation left cannot be damaged in this way
            continue
        name = str(path.relative_to(box.damaged))
        mutation.told += f"{way.__name__} {name} {what}; "
        mutation.touched.add(name)
    return mutation


def a_file(rng, box, suffix=""):
    files = [path for path in sorted(box.damaged.rglob(f"*{suffix}")) if path.is_file()]
    return rng.choice(files)


def truncate(rng, box):
    path = a_file(rng, box)
    data = path.read_bytes()
    keep = rng.choice([0, 1, len(data) - 1, rng.randrange(len(data))])
    path.write_bytes(data[:keep] if rng.random() < 0.8 else data + data[: keep + 1])
    return path, f"at {keep}"


def flip(rng, box):
    path = a_file(rng, box)
    data = bytearray(path.read_bytes())
    places = [rng.randrange(len(data)) for _ in range(rng.choice([1, 1, 3, 50]))]
    for place in places:
        data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return path, f"bits at {places[:3]}"


def overwrite(rng, box):
    """A giant or otherwise odd number somewhere, above all where sizes stand."""
    path = a_file(rng, box)
    data = bytearray(path.read_bytes())
    place = rng.choice([0, 0, 8, 16, rng.randrange(len(data))])
    width = rng.choice(WORDS)
    number = rng.choice([0, 1, 2**31, 2**32, 2**63, 2**64 - 1, len(data), len(data) - 8])
    data[place : place + width] = struct.pack("<Q", number % 2**64)[:width]
    path.write_bytes(data)
    return path, f"{width} bytes of {number} at {place}"


def replace(rng, box):
    """Another kind of content under the same name."""
    path = a_file(rng, box)
    what, content = rng.choice(
        [
            ("nothing", b""),
            ("a pickle", pickle.dumps(Payload(box.trace))),
            ("deep brackets", b"[" * 200_000),
            ("a deep mapping", b'{"a":' * 50_000),
            ("random bytes", rng.randbytes(1000)),
            ("null", b"null"),
            ("a list", b"[1, 2]"),
            ("an object", b"{}"),
            ("a long number", b"1" * 5000),
            ("zeros", bytes(5000)),
        ]
    )
    path.write_bytes(content)
    return path, f"by {what}"


def rearrange(rng, box):
    """Files of the directory under each other's names, or missing."""
    one, two = a_file(rng, box), a_file(rng, box)
    if one == two or rng.random() < 0.4:
        one.unlink()
        return one, "removed"
    data = one.read_bytes(), two.read_bytes()
    one.write_bytes(data[1])
    if rng.random() < 0.5:
        two.write_bytes(data[0])
    return one, f"by {two.name}"


def special(rng, box):
    """No plain file: a directory, a link, a device that never ends, a pipe that nobody writes."""
    path = a_file(rng, box)
    path.unlink()
    # Who names a file himself may well mean a pipe, `<(command)`.
    kinds = ["directory", "loop", "nowhere"]
    if not box.named:
        # Who may write to /dev (root) must not point a reader that also writes at a real device.
        kinds += ["pipe"] if os.access("/dev", os.W_OK) else ["/dev/zero", "pipe"]
    kind = rng.choice(kinds)
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        targets = {"loop": path.name, "nowhere": "nothing-here"}
        path.symlink_to(targets.get(kind, kind))
    return path, f"by {kind}"


def spoil(rng, value):
    """Change something anywhere inside a JSON value, in place."""
    places = []

    def collect(container):
        for key in container if isinstance(container, dict) else range(len(container)):
            places.append((container, key))
            if isinstance(container[key], dict | list):
                collect(container[key])

    if not isinstance(value, dict | list):
        raise ValueError("nothing inside to change")
    collect(value)
    container, key = rng.choice(places)
    action = rng.choice(["set", "set", "set", "delete", "rename", "swap", "double"])
    old = container[key]
    if action == "swap":
        other, other_key = rng.choice(places)
        container[key], other[other_key] = other[other_key], container[key]
    elif action == "delete":
        del container[key]
    elif action == "rename" and isinstance(container, dict):
        container[rng.choice([f"{key}x", "__class__", "auto_map", ""])] = container.pop(key)
    elif action == "double" and isinstance(container, list):
        container.append(container[key])
    else:
        container[key] = rng.choice([*ODD, *PATHS, *CODE])
    return f"{action} {str(key)[:40]!r} (was {str(old)[:40]})"


def json_value(rng, box):
    path = a_file(rng, box, ".json")
    value = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(value, dict) and rng.random() < 0.1:
        value["auto_map"] = {
            name: rng.choice(CODE)
            for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
        }
        what = "auto_map added"
    else:
        what = spoil(rng, value)
    text = json.dumps(value)
    if rng.random() < 0.1:  # a key twice
        text = text[:1] + text[1:-1] + ", " + text[1:]
        what += ", doubled"
    path.write_text(text, encoding="utf-8")
    return path, what


def json_line(rng, box):
    path = a_file(rng, box, ".jsonl")
    lines = path.read_text(encoding="utf-8").splitlines()
    number = rng.randrange(len(lines))
    value = json.loads(lines[number])
    what = spoil(rng, value)
    lines[number] = json.dumps(value)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path, f"line {number}: {what}"


def tensor_header(rng, box):
    """A safetensors file's header; its offsets then no longer fit, or name other bytes."""
    path = a_file(rng, box, ".safetensors")
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    value = json.loads(data[8 : 8 + length])
    what = spoil(rng, value)
    text = json.dumps(value).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return path, f"header: {what}"


def yaml_text(rng, box):
    path = a_file(rng, box, ".yaml")
    lines = path.read_text(encoding="utf-8").splitlines()
    number = rng.randrange(len(lines))
    key, colon, value = lines[number].partition(":")
    bomb = ["&a [x, x, x, x, x, x, x, x, x]"]
    for one, two in zip("abcdefghijkl", "bcdefghijklm", strict=True):
        bomb.append(f"&{two} [{', '.join([f'*{one}'] * 9)}]")
    put = rng.choice(
        [
            "1" * 5000,
            "0x" + "f" * 5000,
            "1e999",
            ".nan",
            "2024-99-99",
            "!!python/object/apply:os.mkdir [trace]",
            "!!binary '***'",
            "!!int x",
            "!!float []",
            "!!timestamp yesterday",
            "{? [1, 2] : 3}",
            "{<<: [1], a: 2}",
            "&x [*x]",
            "*nothing",
            "'\\ud800'",
            "[" * 3000,
            "{a: " * 3000,
            "- " * 3000,
            *(json.dumps(value) for value in ODD),
            *PATHS,
        ]
    )
    how = rng.choice(["value", "value", "value", "key", "bomb", "delete", "repeat"])
    if how == "value":
        lines[number] = f"{key}{colon or ':'} {put}"
    elif how == "key":
        lines[number] = f"{put}: {value}"
    elif how == "bomb":
        lines[number] = f"{key}{colon or ':'} [{', '.join(bomb)}]"
    elif how == "delete":
        del lines[number]
    else:
        lines.insert(number, lines[number])
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    return path, f"line {number}: {how} {put[:40]}"


def gguf_field(rng, box):
    """A count, length, type, name, dimension, offset or value of a GGUF header, in its place.

    Places are those of the clean file, whose header is as long.
    """
    from gguf import GGUFReader

    path = a_file(rng, box, ".gguf")
    reader = GGUFReader(box.clean / path.name)
    fields = rng.choice([list(reader.fields.values()), [t.field for t in reader.tensors]])
    field, other = rng.choice(fields), rng.choice(fields)
    part = rng.randrange(min(len(field.parts), 8))
    place = field.offset + sum(int(before.nbytes) for before in field.parts[:part])
    width = int(field.parts[part].nbytes)
    numbers = [0, 1, 3, 8, 9, 30, 255, 2**20, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]
    what, content = rng.choice(
        [
            *[("a number", struct.pack("<Q", rng.choice(numbers)).ljust(width, b"\0"))] * 3,
            ("random bytes", rng.randbytes(width)),
            ("the same of another", other.parts[min(part, len(other.parts) - 1)].tobytes()),
        ]
    )
    data = bytearray(path.read_bytes())
    data[place : place + width] = content[:width].ljust(width, b"a")
    path.write_bytes(data)
    return path, f"part {part} of {field.name[:40]!r}: {what} {content[:8].hex()}"


BY_SUFFIX = {
    ".gguf": gguf_field,
    ".json": json_value,
    ".jsonl": json_line,
    ".safetensors": tensor_header,
    ".yaml": yaml_text,
}
