"""One of the processes of test_fsdp.py: trains tiny models under FSDP2, writes what happened.

Usage: fsdp_worker.py RANK WORLD_SIZE STORE RESULT
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sparse_bitnet.nn import (
    DerivedModule,
    convert,
    converted_modules,
    master_weights,
    refresh,
    set_pattern,
)

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
        bf16: bool = False,
        checkpointed: bool = False,
        accumulate: int = 1,
        meta: bool = False,
        staircase: bool = False,
        evaluate: bool = False,
    ) -> None:
        self.architecture, self.kind, self.compile = architecture, kind, compile
        self.bf16, self.checkpointed, self.accumulate = bf16, checkpointed, accumulate
        self.meta, self.staircase, self.evaluate = meta, staircase, evaluate


SCENARIOS = {
    "eager": Scenario(),
    "twin": Scenario(kind="bf16"),
    "experts": Scenario("mixtral"),
    "gathered in bf16": Scenario(bf16=True),
    "checkpointed": Scenario(checkpointed=True),
    "accumulated": Scenario(accumulate=2),
    "staircase": Scenario(staircase=True),
    "evaluated": Scenario(evaluate=True),
    "loaded from meta": Scenario(meta=True),
    # A compiled forward never looks whether its buffers are stale.
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
    options: dict[str, Any] = {}
    if scenario.bf16:
        # Master weights stay float32 in shards; gradients are reduced in float32.
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for block in model.model.layers:
        if scenario.compile is not None:
            block.compile(**scenario.compile)
        fully_shard(block, **options)
    fully_shard(model, **options)
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
    """Losses of each step (mean over ranks) and how many modules derived in it."""
    model = build(scenario, "meta" if scenario.meta and world > 1 else "cpu")
    if scenario.checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if world > 1:
        shard(model, scenario)
    count = _count_derivations()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, derived = [], []
    model.train()
    for step in range(STEPS):
        if scenario.staircase:
            set_pattern(model, ("dense", "6:8", "4:8", "2:8")[step])
        count.clear()
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
        derived.append(len(count))
    return {"losses": losses, "derived": derived, "fresh": fresh(model)}


def fresh(model: nn.Module) -> bool:
    """Whether buffers are what the whole float32 master weights give."""
    before = [buffer.clone() for _, m in converted_modules(model) for buffer in m.buffers()]
    refresh(model)
    after = [buffer for _, m in converted_modules(model) for buffer in m.buffers()]
    assert all(isinstance(w.weight, DTensor) for w in master_weights(model)) == (
        dist.is_initialized()
    )
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


_originals: dict[type[DerivedModule], Callable[[Any], None]] = {}


def _count_derivations() -> list[DerivedModule]:
    seen: list[DerivedModule] = []
    for kind in set(_kinds(DerivedModule)):
        original = _originals.setdefault(kind, kind.derive)

        def counted(self: DerivedModule, original: Any = original) -> None:
            seen.append(self)
            original(self)

        kind.derive = counted  # type: ignore[method-assign]
    return seen


def _kinds(base: type[DerivedModule]) -> list[type[DerivedModule]]:
    found = [kind for kind in base.__subclasses__() if "derive" in vars(kind)]
    return found + [kind for sub in base.__subclasses__() for kind in _kinds(sub)]


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
    if rank == 0:
        Path(result).write_text(json.dumps(results), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
