"""Which architectures' logits are the head's product, and which change it afterwards."""

import pytest
import torch
from torch import nn

from sparse_bitnet.nn.head import has_plain_head

GEMMA = {"head_dim": 8, "tie_word_embeddings": False}


@pytest.mark.parametrize(
    "architecture", ["qwen2", "llama", "mistral", "qwen3", "qwen2_moe", "mixtral", "gpt2", "phi"]
)
@pytest.mark.parametrize("training", [True, False])
def test_plain(tiny, architecture, training):
    model = tiny(architecture, hidden_act="gelu").train(training)
    model.model.layers[0].eval() if hasattr(model, "model") else None
    modes = [module.training for module in model.modules()]
    assert has_plain_head(model)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("gemma2", GEMMA | {"final_logit_softcapping": 30.0}),
        ("granite", {"logits_scaling": 1.001}),
        ("cohere", {"logit_scale": 0.0625}),
    ],
)
@pytest.mark.parametrize("zero", [False, True])
def test_changed_afterwards(tiny, architecture, changes, zero):
    """Whatever the weights: those of an untrained model make small logits, or none."""
    model = tiny(architecture, **changes)
    if zero:
        nn.init.zeros_(model.get_output_embeddings().weight)
    assert not has_plain_head(model)


def test_a_cap_that_is_switched_off_is_none(tiny):
    assert has_plain_head(tiny("gemma2", **GEMMA, final_logit_softcapping=None))


def test_a_head_that_is_given_something_else(tiny):
    model = tiny()
    model.lm_head = nn.Sequential(model.lm_head)
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    assert not has_plain_head(model)


def test_in_bfloat16(tiny):
    assert has_plain_head(tiny().to(torch.bfloat16))
