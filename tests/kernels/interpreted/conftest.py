"""Triton's kernels on CPU tensors: collected only under TRITON_INTERPRET=1.

The interpreter has to be on before Triton is first imported, so these run in a process of their
own, which tests/kernels/test_interpreted.py starts.
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
