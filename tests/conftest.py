"""One thread for each test process: `make test` runs one a core, and more threads than cores make
PyTorch many times slower. Processes that tests start inherit the setting."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
