"""FSDP2 on two and four processes trains as one process does, and gathers two bits a weight."""

import gc
import weakref
from functools import cache

import pytest
import torch
from torch.distributed.tensor import Shard

import fsdp_ranks
from processes import run_processes
from sparse_bitnet import nn
from sparse_bitnet.core import ConfigError
from sparse_bitnet.estimate.devices import GPUS
from sparse_bitnet.estimate.estimate import sharding
from sparse_bitnet.formats import two_bit
from sparse_bitnet.nn.gathered import GatheredTernary
from sparse_bitnet.nn.shards import MasterShard, _Group, _Source


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Results of every scenario, from one pair of processes: their start takes longest."""
    return run_ranks(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    return run_ranks(4, tmp_path_factory.mktemp("four"))


@cache
def one_process(name):
    return fsdp_ranks.run(fsdp_ranks.SCENARIOS[name], 0, 1)


def run_ranks(ranks, directory):
    """What the first rank found."""
    calls = [(rank, ranks, directory / "store") for rank in range(ranks)]
    found = run_processes(fsdp_ranks.main, calls)[0]
    return found


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("name", fsdp_ranks.SCENARIOS)
def test_two_ranks_train_as_one_process(two_ranks, name, threads):
    found, expected = two_ranks[name], one_process(name)
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert found["ternary"] == expected["ternary"]  # at every step, to the bit


@pytest.mark.parametrize("name", fsdp_ranks.OF_FOUR)
def test_four_ranks_train_as_one_process(four_ranks, name, threads):
    found, expected = four_ranks[name], one_process(name)
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert found["ternary"] == expected["ternary"]


def test_two_bits_travel(two_ranks, four_ranks):
    """Forward and backward each gather a quarter of a byte a weight, γ and the norms of a block."""
    for found in (two_ranks["counted"], four_ranks["counted"]):
        received = found["bytes"]["_allgather_base_ torch.uint8"]  # with what no weight is: norms
        assert 0.5 < received / found["weights"] < 0.6
        head = 2 * 72 * 64 * 4 + 64 * 4  # the root's: embeddings, head and last norm, once
        # What ``estimate`` says, without norms and γ, for a rank that receives its own part too.
        plan = sharding(found["weights"], 2, head // 4, GPUS["h200"], 10**6, 1)
        assert plan["gathered"] == pytest.approx(received + head, rel=0.05)
        assert received + head == sum(
            size for name, size in found["bytes"].items() if name.startswith("_allgather")
        )


def test_nothing_whole_outlives_its_layer(two_ranks):
    counted = two_ranks["counted"]
    assert counted["kept"] == []  # for backward, of the shape of a weight
    assert counted["held"] == [0] * 14  # bytes of what was gathered, between forward and backward


def test_shards_cut_otherwise_are_refused():
    module = torch.nn.Linear(8, 8)
    with pytest.raises(ConfigError, match="leave it out"):
        nn.shard(module, shard_placement_fn=lambda p: Shard(1))


def test_gathered_weights_have_no_values():
    ternary = torch.tensor([[1, 0, -1, 0, 1]], dtype=torch.int8)
    weight = GatheredTernary(two_bit.pack(ternary), torch.ones(1), ternary.shape, torch.float32)
    assert (weight.dtype, weight.shape) == (torch.float32, (1, 5))
    assert torch.equal(torch.zeros_like(weight), torch.zeros(1, 5))
    with pytest.raises(ConfigError, match="only the ternary weight is gathered"):
        weight + 1


def test_edits_of_shards_are_seen(two_ranks, threads):
    expected, found = fsdp_ranks.edited()["sums"], two_ranks["edited"]["sums"]
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert len({round(value, 3) for value in found}) == len(found)


def test_weights_that_a_forward_cannot_use_are_refused(two_ranks):
    assert "was torch.float32 and is torch.bfloat16 in this forward" in two_ranks["refused"]["bf16"]
    assert "is sharded here" in two_ranks["refused"]["alone"]
    assert "call set_quantization before" in two_ranks["refused"]["blended late"]


def test_state_dict_is_that_of_the_dense_model(two_ranks):
    assert two_ranks["state dict"]


def test_a_shard_does_not_keep_its_module():
    """FSDP2 holds shards; the module that they lead to can go."""
    layer = nn.SparseBitLinear(torch.nn.Linear(8, 8))
    source = _Source(layer, "weight", layer.weight.shape, _Group())
    layer.weight = torch.nn.Parameter(MasterShard(layer.weight.detach(), source))
    there = weakref.ref(layer)
    del layer
    gc.collect()
    assert there() is None
