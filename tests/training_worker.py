"""A training for tests that kill it or run it on several ranks: ``RECIPE [MODE AT]``.

Says on standard output where it hangs, so that the test kills it there and not by chance.
"""

import resource
import sys
import time

import torch

from sparse_bitnet.core import SparseBitNetError
from sparse_bitnet.train import checkpoint, load_recipe, train


def hang(where):
    print(where, flush=True)
    time.sleep(600)


def hang_after_step(wanted):
    def on_step(done, _model):
        if done == wanted:
            hang(f"after step {done}")

    return on_step


def hang_while_writing(wanted):
    """When the tensors of a checkpoint are on disk and its manifest is not."""
    write_text = checkpoint.write_text

    def write(path, text):
        if f"step-{wanted:08d}" in str(path):
            hang(f"writing {path}")
        write_text(path, text)

    checkpoint.write_text = write


def fill_the_disk_after_step(wanted):
    """A limit of the size of files stands for it: the system refuses the write that crosses it."""

    def on_step(done, _model):
        if done == wanted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    return on_step


def main(recipe, mode="run", at="0"):
    torch.set_num_threads(1)
    on_step = None
    if mode == "step":
        on_step = hang_after_step(int(at))
    elif mode == "full":
        on_step = fill_the_disk_after_step(int(at))
    elif mode == "write":
        hang_while_writing(int(at))
    elif mode == "slow":
        on_step = lambda done, _: (print(f"after step {done}", flush=True), time.sleep(0.2))  # noqa: E731
    try:
        train(load_recipe(recipe), on_step)
    except SparseBitNetError as error:
        print(error, file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))


if __name__ == "__main__":
    main(*sys.argv[1:])
