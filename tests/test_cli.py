"""The command line: verbs, errors of ours as one line, exit codes."""

import inspect
import re
import subprocess
import sys
import threading
import tomllib
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

import sparse_bitnet
from sparse_bitnet import cli
from sparse_bitnet.core import ConfigError, DataError, PatternError
from sparse_bitnet.study.sweep import SweepResult

ROOT = Path(__file__).parents[1]


def exit_code(arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    return stopped.value.code


def test_every_verb_exists_and_is_in_the_overview(capsys):
    cli.main([])
    overview = capsys.readouterr().out
    for verb, (module, function, line) in cli.VERBS.items():
        call = getattr(import_module(f"sparse_bitnet.{module}"), function)
        assert inspect.getdoc(call), verb
        assert verb in overview and line in overview


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_every_verb(verb, capsys):
    if verb == "train":
        cli.main(["train", "--help"])
    else:
        assert exit_code([*verb.split(), "--help"]) == 0
    assert f"sparse-bitnet {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        ("xyz", ""),
        ("data", "; did you mean data prepare?"),
        ("data prepar text out", "; did you mean data prepare?"),
        ("evalute packed", "; did you mean evaluate?"),
        ("in", "; did you mean inspect?"),
        ("sweeps", "; did you mean sweep?"),
    ],
)
def test_an_unknown_verb(arguments, meant, capsys):
    assert exit_code(arguments.split()) == cli.MISUSED
    *overview, said = capsys.readouterr().err.splitlines()
    assert said == f"error: there is no verb '{arguments.split(maxsplit=1)[0]}'{meant}"
    assert "\n".join(overview) == cli.OVERVIEW


@pytest.mark.parametrize(
    ("verb", "usage"),
    [
        ("data prepare", "SOURCE OUT"),
        ("pack", "MODEL OUT"),
        ("export", "MODEL OUT"),
        ("import", "SOURCE OUT"),
        ("evaluate", "MODEL [BASELINE]"),
        ("generate", "MODEL PROMPT"),
        ("bench", "[MODELS]"),
    ],
)
def test_usage_names_what_stands_where(verb, usage, capsys):
    assert exit_code([*verb.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert usage in shown.splitlines()[0] and "``" not in shown and "{None}" not in shown


@pytest.mark.parametrize("verb", ["pack", "data prepare"])
def test_help_before_the_verb(verb, capsys):
    assert exit_code(["help", *verb.split()]) == 0
    before = capsys.readouterr().out
    assert exit_code([*verb.split(), "--help"]) == 0
    assert capsys.readouterr().out == before
    cli.main(["help"])
    assert "data prepare" in capsys.readouterr().out


def test_a_sweep_with_failed_cells_is_shown_and_exits_1(monkeypatch, capsys):
    result = SweepResult(Path("rows.jsonl"), 3, {"bitnet 3:5": "out of memory"}, [])
    monkeypatch.setattr(cli, "_call", lambda verb, arguments: result)
    assert exit_code(["sweep"]) == cli.FAILED
    assert "out of memory" in capsys.readouterr().out
    monkeypatch.setattr(cli, "_call", lambda verb, arguments: replace(result, failed={}))
    cli.main(["sweep"])


def test_errors_are_one_line_and_a_code(monkeypatch, capsys):
    for error, code in (
        (DataError("the shard is gone"), cli.FAILED),
        (ConfigError("steps is -1"), cli.MISUSED),
        (PatternError("pattern 9:8 is out of range"), cli.MISUSED),
        (PermissionError(13, "Permission denied", "/out"), cli.FAILED),
        (KeyboardInterrupt(), cli.INTERRUPTED),
    ):

        def fail(verb, arguments, error=error):
            raise error

        monkeypatch.setattr(cli, "_call", fail)
        assert exit_code(["pack", "a", "b"]) == code
        written = capsys.readouterr().err
        assert "Traceback" not in written
        said = "/out: Permission denied; check" if isinstance(error, OSError) else str(error)
        assert said in written


def test_a_missing_model_is_told_plainly(capsys):
    assert exit_code(["inspect", "no/such/model"]) == cli.FAILED
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "no/such/model" in message
    thread = threading.Thread(target=exit_code, args=(["inspect", "no/such/model"],))
    thread.start()  # where no signal is handled
    thread.join()
    assert capsys.readouterr().err == message


def test_a_place_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "text").write_text("some words")
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "out")
    assert exit_code(["data", "prepare", f"text:{tmp_path / 'text'}", out]) == cli.FAILED
    message = capsys.readouterr().err
    assert message.startswith("error: ") and out in message and "Traceback" not in message


PIPED = """
import os, runpy, sys
read, write = os.pipe()
os.dup2(write, 1)
os.close(write), os.close(read)
sys.argv = ["sparse-bitnet", "data", "prepare", "--help"]
runpy.run_module("sparse_bitnet", run_name="__main__")
sys.exit()
"""


def test_a_closed_pipe_is_no_crash(only_torch):
    """As ``| head -1`` closes it; also when Python ends, which writes what is still held."""
    done = only_torch(PIPED)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("ignored", [False, True])
def test_an_interrupt_while_modules_are_imported(ignored):
    """Seconds in which a KeyboardInterrupt would strike somewhere in PyTorch or transformers."""
    script = (
        "import os, signal\n"
        "from sparse_bitnet import cli\n"
        f"ours = signal.SIG_IGN if {ignored} else signal.default_int_handler\n"
        "signal.signal(signal.SIGINT, ours)\n"  # whatever this process was started with
        "def interrupted(_):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    except BaseException:\n"
        "        raise ImportError('as some libraries have it')\n"
        "    raise SystemExit(0)\n"
        "cli.import_module = interrupted\n"
        "cli.main(['pack', 'a', 'b'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    expected = (0, "") if ignored else (cli.INTERRUPTED, "interrupted\n")
    assert (done.returncode, done.stderr) == expected


@pytest.mark.parametrize("arguments", ["help", "--version", "pakc model out"])
def test_what_needs_no_verb_waits_for_no_import(arguments):
    script = (
        "import contextlib, sys\n"
        "from sparse_bitnet.cli import main\n"
        "with contextlib.suppress(SystemExit):\n"
        "    main(sys.argv[1:])\n"
        "assert not {'torch', 'tyro', 'numpy', 'transformers'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", script, *arguments.split()], check=True)


def test_the_package_names_what_it_promises():
    for name in sparse_bitnet.__all__:
        assert getattr(sparse_bitnet, name) is not None
    assert set(sparse_bitnet.__all__) <= set(dir(sparse_bitnet))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sparse_bitnet.nothing  # noqa: B018


def test_version(capsys):
    """That of the source that runs, not of what pip noted when it was installed."""
    cli.main(["--version"])
    newest = re.search(
        r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert capsys.readouterr().out == f"sparse-bitnet {newest[1]}\n"
    described = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert described["tool"]["setuptools"]["dynamic"]["version"] == {
        "attr": "sparse_bitnet.version.__version__"
    }
