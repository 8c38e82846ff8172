"""The page of mathematics names functions and files that exist."""

import re
from pathlib import Path

from sparse_bitnet import core
from sparse_bitnet.nn.sparse_bit_linear import BitProduct

PAGE = Path(core.__file__).with_name("README.md")
ELSEWHERE = {"BitProduct": BitProduct, "ternary_matmul": None, "segments": None}


def test_links_and_names_exist() -> None:
    text = PAGE.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 8
    for link in links:
        assert (PAGE.parent / link).is_file(), link
    for name in re.findall(r"`([A-Za-z_0-9]+)`", text):
        assert hasattr(core, name) or name in ELSEWHERE or name == "in", name


def test_windows_lose_nothing_as_the_page_says() -> None:
    """Every placement of non-zeros in a group, by brute force."""
    for half in (2, 3, 4, 5):
        lanes = 2 * half
        for places in range(2**lanes):
            nonzeros = [lane for lane in range(lanes) if places >> lane & 1]
            if len(nonzeros) > lanes - 2:
                continue
            room = [2] * (half - 1)
            for lane in nonzeros:
                covering = [w for w in range(half - 1) if 2 * w <= lane < 2 * w + 4 and room[w]]
                assert covering, (lanes, nonzeros)
                room[covering[0]] -= 1
