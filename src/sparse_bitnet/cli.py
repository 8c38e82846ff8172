"""Command line: parsing only, one sub-command a verb.

Each verb is a function with typed arguments; tyro turns its signature and docstring into options,
required ones positional. PyTorch takes seconds to import, so it waits until a verb is known: an
overview, the version or a mistyped verb is answered at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from difflib import get_close_matches
from importlib import import_module
from types import FrameType
from typing import Any

from sparse_bitnet.console import err, out, say
from sparse_bitnet.version import __version__

# verb: (module, function, one line for the overview)
VERBS = {
    "demo": ("demo", "demo", "the whole way on this machine: train, measure, pack, run"),
    "data prepare": ("data.prepare", "prepare", "text → tokenized, memory-mapped shards"),
    "train": ("train.command", "train_command", "train a recipe, from scratch or from a model"),
    "evaluate": ("packed.verbs", "evaluate", "perplexity, cloze accuracy, tasks of a model"),
    "pack": ("packed.verbs", "pack", "trained model → packed directory"),
    "export": ("export.verbs", "export", "model → GGUF for llama.cpp, or bitnet for transformers"),
    "import": ("export.verbs", "import_checkpoint", "bitnet checkpoint, or GGUF, → model"),
    "inspect": ("packed.verbs", "inspect", "what a model directory holds, layer by layer"),
    "generate": ("serve.generate", "generate_command", "stream text from a model directory"),
    "chat": ("serve.chat", "chat", "talk with a model directory on the terminal"),
    "serve": ("serve.serve", "serve", "OpenAI-compatible HTTP server of a model directory"),
    "estimate": ("estimate.estimate", "estimate", "memory, speed, cost of a model before training"),
    "sweep": ("study.sweep", "sweep", "run a grid of trainings, resumable"),
    "report": ("study.report", "report", "plots and tables of a sweep as one HTML page"),
    "polarization": ("study.polarization", "analyse", "weight statistics of any model"),
    "bench": ("bench", "bench", "prefill and decode speed of model directories, here"),
    "kernels": ("kernels.registry", "explain", "which kernel serves what on this machine, and why"),
}
OVERVIEW = "usage: sparse-bitnet VERB [options]      sparse-bitnet VERB --help\n\n" + "\n".join(
    f"  {verb:14} {line}" for verb, (_, _, line) in VERBS.items()
)
# Verbs whose options are not known before their first argument is read.
READ_THEIR_OWN_ARGUMENTS = {"train"}

FAILED, MISUSED, INTERRUPTED = 1, 2, 130


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``sparse-bitnet``.

    Exits 1 for an error of ours, 2 for arguments that make no sense, 128 + the signal's number when
    interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["help"]:  # help pack is pack --help
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] in {"-h", "--help"}:
        out.print(OVERVIEW, markup=False)
        return
    if arguments == ["--version"]:
        out.print(f"sparse-bitnet {__version__}", markup=False, highlight=False)
        return
    verb = next((v for v in VERBS if arguments[: len(v.split())] == v.split()), None)
    if verb is None:
        err.print(OVERVIEW, markup=False)
        say(f"error: there is no verb {arguments[0]!r}{_suggestion(arguments)}")
        sys.exit(MISUSED)
    with _quitting_at_once():
        from sparse_bitnet import core, files
    try:
        result = _call(verb, arguments[len(verb.split()) :])
        _show(result)
        if code := getattr(result, "exit_code", 0):  # done, but not all of it
            sys.exit(code)
    except (core.ConfigError, core.PatternError) as error:
        say(f"error: {error}")
        sys.exit(MISUSED)
    except core.SparseBitNetError as error:
        say(f"error: {error}")
        sys.exit(getattr(error, "exit_code", FAILED))
    except BrokenPipeError:
        # Whoever read our output has enough of it; do not fail again when it is flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        say(f"error: {where}{files.explain(error)}")
        sys.exit(FAILED)
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(INTERRUPTED)


def _call(verb: str, arguments: list[str]) -> Any:
    module, function, _ = VERBS[verb]
    with _quitting_at_once():
        import tyro

        call = getattr(import_module(f"sparse_bitnet.{module}"), function)
    if verb in READ_THEIR_OWN_ARGUMENTS:
        return call(arguments)
    return tyro.cli(
        call,
        prog=f"sparse-bitnet {verb}",
        args=arguments,
        config=(
            tyro.conf.PositionalRequiredArgs,
            tyro.conf.PositionalMetavarFromFieldName,
            tyro.conf.DisallowNone,
            tyro.conf.FlagCreatePairsOff,
        ),
    )


@contextmanager
def _quitting_at_once() -> Iterator[None]:
    """While modules are imported, Ctrl-C ends the process: there is nothing to undo yet, and an
    exception might be swallowed or printed with a traceback, wherever it strikes."""

    def quit_at_once(number: int, frame: FrameType | None) -> None:
        os.write(sys.stderr.fileno(), b"interrupted\n")
        os._exit(INTERRUPTED)

    # Not in a thread, where handlers cannot be set, nor where it is ignored, as in the background.
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, quit_at_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _show(result: Any) -> None:
    """Results go to standard output: figures as JSON, everything else as its own text."""
    if result is None:
        return
    if is_dataclass(result) and type(result).__str__ is object.__str__:
        result = asdict(result)  # type: ignore[arg-type]
    if isinstance(result, dict | list):
        result = json.dumps(result, indent=1, default=str, ensure_ascii=False)
    out.print(str(result), markup=False)


def _suggestion(arguments: list[str]) -> str:
    close = [verb for verb in VERBS if arguments[0] and verb.startswith(arguments[0])]
    close = close or get_close_matches(" ".join(arguments[:2]), VERBS)
    close = close or get_close_matches(arguments[0], VERBS)
    return f"; did you mean {' or '.join(close)}?" if close else ""
