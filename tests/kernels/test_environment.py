"""Which commit a run is of."""

import subprocess

from sparse_bitnet.kernels import environment as module


def test_the_commit_is_ours_or_what_the_variable_says(monkeypatch, tmp_path):
    installed = tmp_path / "site" / "environment.py"
    installed.parent.mkdir()
    installed.write_text("")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(module, "__file__", str(installed))
    monkeypatch.setenv("GIT_COMMIT", "abc")
    assert module.commit() == "abc"
    monkeypatch.delenv("GIT_COMMIT")
    assert module.commit() is None
