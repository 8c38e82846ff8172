"""Weight statistics of a checkpoint, as the verb ``polarization`` measures them.

What is measured are finite fractions.
"""

import math

import toy

from sparse_bitnet.study import polarization
from sparse_bitnet.train.config import SparsityConfig
from sparse_bitnet.train.export import save_trained


def build(directory):
    save_trained(toy.model(), None, directory, SparsityConfig())
    polarization._pictures = lambda *_: {}


def read(directory, mutation):
    result = polarization.analyse(directory, directory.parent / "statistics").values
    for one in [result["overall"], *result["layers"]]:
        figures = [one["zeros_before_mask"], one["dead_zone_groups"], *one["magnitudes"]]
        assert all(0 <= figure <= 1 for figure in figures)
        assert math.isfinite(one["kurtosis"])
