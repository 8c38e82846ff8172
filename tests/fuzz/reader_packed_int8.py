"""A packed directory whose head and embedding are one int8 table.

What loads has finite, positive scales; with its ``config.json`` as it was, it computes what the
clean one did.
"""

import torch
import toy

from sparse_bitnet.nn.int8_head import Int8Table
from sparse_bitnet.packed.load import load_packed
from sparse_bitnet.packed.write import pack

expected = {}


def build(directory):
    pack(toy.model("2:4"), directory, storage="trits", head="int8")


@torch.no_grad()
def read(directory, mutation):
    loaded = load_packed(directory)
    for module in loaded.modules():
        if isinstance(module, Int8Table):
            assert module.weight.dtype == torch.int8
            assert module.weight_scale.isfinite().all() and (module.weight_scale > 0).all()
    if "config.json" not in mutation.touched:
        logits = loaded(toy.TOKENS).logits
        assert torch.equal(expected.setdefault("logits", logits), logits), "computes something else"
