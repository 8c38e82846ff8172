"""A ``config.json``, for an estimate: all that is known of a model that may be of any size.

What is estimated are finite, positive figures.
"""

import math

from sparse_bitnet.estimate.estimate import estimate
from sparse_bitnet.train.presets import preset_config


def build(directory):
    preset_config("tiny", 300).save_pretrained(directory)


def read(directory, mutation):
    found = estimate(str(directory))
    for seconds in (found.prefill.packed.seconds, found.decode.packed.seconds):
        assert math.isfinite(seconds) and seconds > 0
    str(found)
