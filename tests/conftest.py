"""What all test processes share: one thread each, and a compile cache of their own.

`make test` runs one process a core, and more threads than cores make PyTorch many times slower.
PyTorch's compile cache does not tell processors apart, so the user's own is not read, and code that
a test made for another processor does not stay. Processes that tests start inherit these settings.
"""

import atexit
import gc
import os
import shutil
import tempfile

from processes import collect_rarely

pytest_plugins = ["packed_models"]  # tests/packed_models.py, imported after the lines below

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Otherwise every process that compiles builds and loads a program for each vector instruction set
# that the processor names, before it believes it.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share what the process that starts them made
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="sparse-bitnet-compiled-")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)


def pytest_collection_finish():
    collect_rarely()


def pytest_unconfigure():
    gc.unfreeze()  # libraries look for leaks of theirs when Python ends
