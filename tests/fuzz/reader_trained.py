"""The directory of a trained model: master weights, ``sparse_bitnet.json``, tokenizer.

What loads has the weights that were written, unless config.json or sparse_bitnet.json was edited,
and ternary ones that keep the pattern.
"""

import torch
import toy

from sparse_bitnet.core import worst_group
from sparse_bitnet.nn import SparseBitLinear
from sparse_bitnet.train.config import SparsityConfig
from sparse_bitnet.train.export import load_trained, save_trained

written = {}


def build(directory):
    model = toy.model()
    save_trained(model, toy.tokenizer(), directory, SparsityConfig(rules={"o_proj": "4:8"}))
    written.update({name: tensor.clone() for name, tensor in model.state_dict().items()})


def read(directory, mutation):
    model, _ = load_trained(directory)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all()
        if not any(file.endswith(("config.json", "bitnet.json")) for file in mutation.touched):
            assert torch.equal(parameter, written[name]), f"{name}: other weights"
    for module in model.modules():
        if isinstance(module, SparseBitLinear):
            if not module.pattern.is_dense:
                assert worst_group(module.derived()[0], module.pattern.m) <= module.pattern.n
            assert module.derived()[1].isfinite().all() and (module.derived()[1] > 0).all()
