"""One of the processes of test_fsdp.py: trains tiny models under FSDP2, writes what happened.

Usage: fsdp_worker.py RANK WORLD_SIZE STORE RESULT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sparse_bitnet.core import ConfigError
from sparse_bitnet.nn import convert, master_weights, set_pattern
from sparse_bitnet.nn import shard as fsdp

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
STEPS = 4


class Scenario:
    """One way to train; the same class describes the single process to compare with."""

    def __init__(
        self,
        architecture: str = "qwen2",
        kind: Any = "bitnet",
        compile: dict[str, Any] | None = None,
        checkpointed: bool = False,
        accumulate: int = 1,
        meta: bool = False,
        staircase: bool = False,
        evaluate: bool = False,
    ) -> None:
        self.architecture, self.kind, self.compile = architecture, kind, compile
        self.checkpointed, self.accumulate = checkpointed, accumulate
        self.meta, self.staircase, self.evaluate = meta, staircase, evaluate


SCENARIOS = {
    "eager": Scenario(),
    "twin": Scenario(kind="bf16"),
    "experts": Scenario("mixtral"),
    "checkpointed": Scenario(checkpointed=True),
    "accumulated": Scenario(accumulate=2),
    "staircase": Scenario(staircase=True),
    "evaluated": Scenario(evaluate=True),
    "loaded from meta": Scenario(meta=True),
    "compiled": Scenario(
        meta=True, staircase=True, compile={"fullgraph": True, "backend": "aot_eager"}
    ),
}


def build(scenario: Scenario, device: str = "cpu") -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(scenario.architecture, **SIZES)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    convert(model, "6:8", kind=scenario.kind)
    return model


def shard(model: PreTrainedModel, scenario: Scenario) -> None:
    for block in model.model.layers:
        if scenario.compile is not None:
            block.compile(**scenario.compile)
        fsdp(block)
    fsdp(model)
    if scenario.meta:
        full = build(Scenario(scenario.architecture, scenario.kind)).state_dict()
        model.to_empty(device="cpu")
        for module in model.modules():
            if hasattr(module, "inv_freq"):  # a buffer of transformers that no state dict holds
                module.inv_freq.copy_(type(module)(model.config).inv_freq)
        set_model_state_dict(model, full, options=StateDictOptions(full_state_dict=True))


def batch(step: int) -> Tensor:
    return torch.randint(0, 64, (8, 12), generator=torch.Generator().manual_seed(step))


def run(scenario: Scenario, rank: int, world: int) -> dict[str, Any]:
    """The loss of each step, a mean over ranks."""
    model = build(scenario, "meta" if scenario.meta and world > 1 else "cpu")
    if scenario.checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if world > 1:
        shard(model, scenario)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    model.train()
    for step in range(STEPS):
        if scenario.staircase:
            set_pattern(model, ("dense", "6:8", "4:8", "2:8")[step])
        total = torch.zeros(())
        for part in batch(step).chunk(world)[rank].chunk(scenario.accumulate):
            loss = model(input_ids=part, labels=part).loss / scenario.accumulate
            loss.backward()
            total += loss.detach().float()
        optimizer.step()
        optimizer.zero_grad()
        if scenario.evaluate:
            with torch.inference_mode():
                total += model.eval()(input_ids=batch(99), labels=batch(99)).loss
            model.train()
        if world > 1:
            dist.all_reduce(total)
        losses.append(total.item() / world)
    assert all(isinstance(w.weight, DTensor) for w in master_weights(model)) == (world > 1)
    return {"losses": losses}


def edited() -> dict[str, Any]:
    """Outputs after edits of shards that nothing announces; the last one's error."""
    model = build(Scenario())
    if dist.is_initialized():
        shard(model, Scenario())
    sums = []
    for factor in (1.0, -0.5, 3.0):
        for parameter in model.parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local.data.mul_(factor)
        with torch.no_grad():
            sums.append(model(input_ids=batch(0)).logits.float().sum().item())
    return {"sums": sums}


def refused() -> dict[str, str]:
    """What a forward says when masters are gathered in bf16, and a module by itself in shards."""
    model = build(Scenario())
    for block in model.model.layers:
        fully_shard(block, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    messages = {}
    with torch.no_grad():
        for name, run in {
            "bf16": lambda: model(input_ids=batch(0)),
            "alone": lambda: model.model.layers[1].mlp.up_proj(torch.randn(2, 32)),
        }.items():
            try:
                run()
            except ConfigError as error:
                messages[name] = str(error)
    return messages


def state_round_trip() -> bool:
    """A gathered state dict is the dense model's, keys and values."""
    model = build(Scenario())
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    shard(model, Scenario())
    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return list(gathered) == list(expected) and all(
        torch.equal(gathered[name], expected[name]) for name in expected
    )


def main() -> None:
    rank, world, store, result = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    results: dict[str, Any] = {}
    for name, scenario in SCENARIOS.items():
        torch._dynamo.reset()
        results[name] = run(scenario, rank, world)
    results["state dict"] = state_round_trip()
    results["edited"] = edited()
    results["refused"] = refused()
    if rank == 0:
        Path(result).write_text(json.dumps(results), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
