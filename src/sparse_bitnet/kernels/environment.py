"""What a run depends on besides its configuration: versions, device, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sparse_bitnet.version import __version__

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "triton")


@cache
def environment() -> dict[str, Any]:
    """Versions, device and commit of this process."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        **versions,
        "sparse-bitnet": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "CPU",
        "commit": commit(),
    }


def commit() -> str | None:
    """The repository's commit, with ``+`` behind it if files differ.

    Outside a repository what the environment variable ``GIT_COMMIT`` says, or None.
    """
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # not somebody else's, around an installation
        head = git("rev-parse", "HEAD")
        return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GIT_COMMIT")
