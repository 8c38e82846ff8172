"""The verb ``bench`` on two models in turns."""

import pytest

from sparse_bitnet.bench import bench
from sparse_bitnet.core import ConfigError


def test_two_models_take_turns(pristine):
    directory = pristine / "two-bit"
    heading, *lines = bench((directory, directory / "."), batch=2, prompt=4, new=3).splitlines()
    assert "prefill 2 × 4" in heading and len(lines) == 1  # one path, one model
    assert lines[0].startswith(str(directory))
    assert all(float(rate.replace(",", "")) > 0 for rate in lines[0].split()[-2:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": 0}, "repeats is 0"),
        ({"prompt": 10**6}, "exceed .*context of"),
    ],
)
def test_refusals(pristine, options, message):
    with pytest.raises(ConfigError, match=message):
        bench((pristine / "two-bit",), **options)
