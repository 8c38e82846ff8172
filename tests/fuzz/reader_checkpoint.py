"""A training checkpoint.

What loads restores the state that was saved, bit for bit.
"""

import torch
from transformers import AutoModelForCausalLM

from sparse_bitnet.nn import convert
from sparse_bitnet.train.checkpoint import Checkpoints, _tensors
from sparse_bitnet.train.config import OptimizerConfig
from sparse_bitnet.train.optim import build_optimizer
from sparse_bitnet.train.parallel import Ranks
from sparse_bitnet.train.presets import preset_config
from sparse_bitnet.train.recipe import config_from_dict

STEP = 3
CONFIG = config_from_dict({"data": {"path": "nowhere"}}, "fuzz")
saved = {}


def state(directory, seed):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(preset_config("tiny", 32))
    convert(model, "6:8")
    optimizer = build_optimizer(model, OptimizerConfig())
    here = Ranks(0, 1, torch.device("cpu"))
    return Checkpoints(directory, 2, CONFIG, {"tokens": [1]}, here), model, optimizer


def build(directory):
    checkpoints, model, optimizer = state(directory, seed=0)
    model(input_ids=torch.arange(8).view(1, 8), labels=torch.arange(8).view(1, 8)).loss.backward()
    optimizer.step()
    checkpoints.save(STEP, model, optimizer)
    saved.update({name: t.clone() for name, t in _tensors(model, optimizer).items()})


def read(directory, mutation):
    checkpoints, model, optimizer = state(directory, seed=1)
    step = checkpoints.latest()
    if step is None:
        return  # a checkpoint without its manifest is none: the run begins anew
    checkpoints.load(step, model, optimizer)
    for name, tensor in _tensors(model, optimizer).items():
        assert torch.equal(tensor, saved[name]), f"{name} is not what was saved"
