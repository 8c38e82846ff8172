"""The page of mathematics names functions and files that exist."""

import re
from pathlib import Path

from sparse_bitnet import core
from sparse_bitnet.nn.sparse_bit_linear import BitProduct

PAGE = Path(core.__file__).with_name("README.md")
ELSEWHERE = {"BitProduct": BitProduct, "ternary_matmul": None, "shard_sizes": None}


def test_links_and_names_exist():
    text = PAGE.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 8
    for link in links:
        assert (PAGE.parent / link).is_file(), link
    for name in re.findall(r"`([A-Za-z_0-9]+)`", text):
        assert hasattr(core, name) or name in ELSEWHERE or name == "in", name
