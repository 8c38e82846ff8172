"""Layers whose weight an architecture reads without calling them are found by a forward pass."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_bitnet.core import ConfigError, WeightError
from sparse_bitnet.nn import SparseBitLinear, convert, converted_modules
from sparse_bitnet.nn.check import check_called, check_packed

# Sizes that these architectures name in their own way; the rest is the conftest's.
MAMBA2 = {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 16, "state_size": 8}
BLEND = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 16,
}
SIZES = {
    "mamba": {"state_size": 8, "time_step_rank": 8},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 8},
    "jamba": {
        "mamba_dt_rank": 8,
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 2,
    },
    "mamba2": MAMBA2,
    "falcon_h1": BLEND | {"mamba_d_ssm": 64, "head_dim": 8},
    "bamba": BLEND | {"attn_layer_indices": [1]},
    "granitemoehybrid": BLEND
    | {"layer_types": ["mamba", "attention"], "num_local_experts": 2, "num_experts_per_tok": 1},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mlp"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 1,
        "ssm_state_size": 8,
        "chunk_size": 16,
        "head_dim": 8,
    },
}
READ_DIRECTLY = ["mamba", "falcon_mamba", "jamba"]
CALLED = ["mamba2", "falcon_h1", "bamba", "granitemoehybrid", "nemotron_h", "qwen2", "mixtral"]


@pytest.mark.parametrize(
    ("architecture", "device"),
    [*((name, "cpu") for name in READ_DIRECTLY), ("mamba", "meta"), ("falcon_mamba", "meta")],
)
def test_layers_that_are_read_directly_are_refused(tiny, architecture, device):
    with torch.device(device):
        model = tiny(architecture, **SIZES[architecture])
    before = {name: type(module) for name, module in model.named_modules()}
    random, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    with pytest.raises(ConfigError, match=r"dt_proj.*MambaMixer reads the weight without") as info:
        convert(model, "2:4")
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())
    rule = str(info.value).partition("the rule '")[2].partition(": skip'")[0]
    report = convert(model, "2:4", rules={rule: "skip"})  # the remedy as it is named
    assert {why for name, why in report.skipped.items() if "dt_proj" in name} == {"a rule skips it"}
    check_called(model)


@pytest.mark.parametrize("architecture", CALLED)
def test_others_convert(tiny, architecture):
    model = tiny(architecture, **SIZES.get(architecture, {}))
    convert(model, "2:4")
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for name, module in converted_modules(model):
        assert all(p.grad is not None for p in module.master_parameters().values()), name
    check_packed(model, "two-bit")


class FusedOutput(nn.Module):
    """As Mamba2 on a GPU: in training a fused kernel gets the weight, else the layer is called."""

    def __init__(self, mlp):
        super().__init__()
        self.out_proj, self.fused = nn.Linear(32, 32), True

    def forward(self, x):
        if self.training and self.fused:
            return F.linear(x, self.out_proj.weight, self.out_proj.bias)
        return self.out_proj(x)


def test_a_layer_that_only_training_reads_directly(tiny):
    model = tiny()
    block = model.model.layers[1]
    block.mlp = FusedOutput(block.mlp)
    model.eval()
    with pytest.raises(ConfigError, match=r"layers.1.mlp.out_proj: FusedOutput reads"):
        convert(model)
    block.mlp.fused = False  # as on another device than the one that trains
    convert(model)
    block.mlp.fused = True
    with pytest.raises(ConfigError, match=r"layers.1.mlp.out_proj: FusedOutput reads"):
        check_packed(model, "two-bit")


def test_parts_that_no_token_reaches_are_no_matter(tiny):
    """An image tower without an image, an expert without a token: nothing is known about them."""
    model = tiny()
    model.model.tower = nn.Sequential(nn.Linear(32, 32))
    model.model.experts = nn.ModuleList([nn.Sequential(nn.Linear(32, 32))])
    convert(model)
    assert isinstance(model.model.tower[0], SparseBitLinear)


def test_a_model_that_does_not_run_converts_and_is_not_packed(tiny):
    model = tiny()

    def fails(*_, **__):
        raise TypeError("it wants pixels")

    model.model.embed_tokens.forward = fails
    convert(model)
    with pytest.raises(ConfigError, match=r"does not run on a few token ids \(TypeError: it wants"):
        check_packed(model, "two-bit")


def double(layer):
    layer.forward = lambda x: 2 * SparseBitLinear.forward(layer, x)


def hook(layer):
    layer.register_forward_hook(lambda module, args, y: y + 1)


@pytest.mark.parametrize("change", [double, hook])
def test_a_layer_that_computes_something_else_is_refused(tiny, change):
    model = tiny()
    convert(model)
    check_packed(model, "two-bit")
    change(model.model.layers[1].self_attn.k_proj)
    with pytest.raises(WeightError, match=r"layers.1.self_attn.k_proj: the packed layer differs"):
        check_packed(model, "two-bit")


def test_only_models_of_transformers_are_run():
    # Nobody knows what others take.
    assert convert(nn.Sequential(nn.Linear(16, 16))).weights == 256
