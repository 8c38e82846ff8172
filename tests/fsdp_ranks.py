"""The ranks of nn/test_fsdp.py: tiny models that train under FSDP2, and what happened to them."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from sparse_bitnet.core import ConfigError, Method, ternarize
from sparse_bitnet.formats import two_bit
from sparse_bitnet.nn import (
    SparseBitExperts,
    SparseBitLinear,
    convert,
    converted_modules,
    master_weights,
    set_pattern,
    set_quantization,
)
from sparse_bitnet.nn import shard as fsdp
from sparse_bitnet.nn.derived import whole
from sparse_bitnet.nn.gathered import GatheredTernary
from tiny_models import tiny_config

SIZES = {"num_local_experts": 4, "num_experts_per_tok": 2}
STEPS = 4
QUANTIZED = (0.3, 0.7, 1, 1)  # λ of each step, where it has a schedule
UNEVEN = {"hidden_size": 40, "num_key_value_heads": 1, "head_dim": 6}


@dataclass(frozen=True)
class Scenario:
    """One way to train; the same class describes the single process to compare with."""

    architecture: str = "qwen2"
    kind: Any = "bitnet"
    compile: dict[str, Any] | None = None
    checkpointed: bool = False
    accumulate: int = 1
    meta: bool = False
    staircase: bool = False
    evaluate: bool = False
    sizes: dict[str, Any] = field(default_factory=dict)
    replicas: int = 1
    method: Method | None = None
    blends: bool = False


SCENARIOS = {
    "eager": Scenario(),
    "twin": Scenario(kind="bf16"),
    "fused": Scenario("phi3"),  # q, k and v in one matrix, gate and up in another
    # Of four ranks, three have two of the six rows of k, and the last has none.
    "uneven": Scenario("llama", sizes=UNEVEN),
    # Nine of 24 + 6 + 6 rows each: one rank has rows of q and k, one of k and v.
    "uneven fused": Scenario("phi3", sizes=UNEVEN),
    "three experts": Scenario("mixtral", sizes={"num_local_experts": 3}),
    "experts": Scenario("mixtral"),
    "checkpointed": Scenario(checkpointed=True),
    "replicated": Scenario(replicas=2),
    "masked first": Scenario("phi3", method=Method(order="mask-then-quant")),
    "mask of gradients": Scenario(method=Method(gradient="masked")),  # gathered whole
    "blended": Scenario(blends=True),  # gathered whole
    "blended experts": Scenario("mixtral", blends=True),
    "accumulated": Scenario(accumulate=2),
    "staircase": Scenario(staircase=True),
    "evaluated": Scenario(evaluate=True),
    "loaded from meta": Scenario(meta=True),
    "compiled": Scenario(
        meta=True, staircase=True, compile={"fullgraph": True, "backend": "aot_eager"}
    ),
}
# What two ranks cannot show: ranks without rows, experts on three of four, shards and replicas.
OF_FOUR = ("uneven", "uneven fused", "three experts", "replicated")


def build(scenario, device="cpu"):
    torch.manual_seed(0)
    config = tiny_config(scenario.architecture, **SIZES | scenario.sizes)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config)
    convert(model, "6:8", kind=scenario.kind, method=scenario.method)
    return model


def shard(model, scenario):
    shards = dist.get_world_size() // scenario.replicas
    sizes = (scenario.replicas, shards) if scenario.replicas > 1 else (shards,)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :])
    for block in model.model.layers:
        if scenario.compile is not None:
            block.compile(**scenario.compile)
        fsdp(block, mesh=mesh)
    fsdp(model, mesh=mesh)
    if scenario.meta:
        full = build(Scenario(scenario.architecture, scenario.kind)).state_dict()
        model.to_empty(device="cpu")
        for module in model.modules():
            if hasattr(module, "inv_freq"):  # a buffer of transformers that no state dict holds
                module.inv_freq.copy_(type(module)(model.config).inv_freq)
        set_model_state_dict(model, full, options=StateDictOptions(full_state_dict=True))


def batch(step):
    return torch.randint(0, 64, (8, 12), generator=torch.Generator().manual_seed(step))


def run(scenario, rank, world):
    """The loss of each step, a mean over ranks."""
    model = build(scenario, "meta" if scenario.meta and world > 1 else "cpu")
    if scenario.checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if scenario.blends:
        set_quantization(model, QUANTIZED[0])
    if world > 1:
        shard(model, scenario)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, seen = [], Seen(model, scenario) if scenario.compile is None else None
    model.train()
    for step in range(STEPS):
        if scenario.staircase:
            set_pattern(model, ("dense", "6:8", "4:8", "2:8")[step])
        if scenario.blends:
            set_quantization(model, QUANTIZED[step])
        total = torch.zeros(())
        for part in batch(step).chunk(world)[rank].chunk(scenario.accumulate):
            loss = model(input_ids=part, labels=part).loss / scenario.accumulate
            loss.backward()
            total += loss.detach().float()
        if seen:
            seen.check()
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
    return {"losses": losses, "ternary": seen.digests if seen else []}


class Seen:
    """Ternary weights that products were given, which must be those of the whole master."""

    def __init__(self, model, scenario):
        self.model = model
        method = scenario.method or Method()
        self.whole = method.gradient != "dense" or scenario.blends
        self.given = {}
        self.digests = []  # of all ternary weights of a step
        for name, module in converted_modules(model):
            module.register_forward_pre_hook(lambda module, _, n=name: self._keep(n, module))

    def _keep(self, name, module):
        for parameter, weight in module.master_parameters().items():
            if isinstance(module, SparseBitLinear | SparseBitExperts):
                ternary, scale, _ = module.derived(parameter)
                two_bits = dist.is_initialized() and not self.whole
                assert two_bits == isinstance(weight, GatheredTernary)
                if isinstance(weight, GatheredTernary):
                    ternary = two_bit.unpack(ternary, weight.shape[-1])
                self.given[f"{name}.{parameter}"] = ternary, scale.clone()

    def check(self):
        digest = hashlib.sha256()
        for one in master_weights(self.model):
            full = whole(one.weight.detach())
            if one.name in self.given:
                method, pattern = one.module.method, one.pattern
                expected = ternarize(full, pattern, method, one.shard_sizes)
                assert all(map(torch.equal, self.given[one.name], expected)), one.name
                digest.update(expected[0].numpy().tobytes())
        self.digests.append(digest.hexdigest())
        self.given.clear()


class Collectives(TorchDispatchMode):
    """Bytes that a rank receives, by operation and dtype."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensor = args[0] if isinstance(args[0], Tensor) else args[0][0]
            self.bytes[f"{func._opname} {tensor.dtype}"] += tensor.numel() * tensor.itemsize
        return func(*args, **(kwargs or {}))


def counted():
    """What a step gathers for two blocks, and what stays of them between forward and backward."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_key_value_heads": 4,
        "vocab_size": 72,
    }
    scenario = Scenario("llama", sizes=sizes)
    model = build(scenario)
    weights = sum(w.weight.numel() for w in master_weights(model))
    shapes = {tuple(w.weight.shape) for w in master_weights(model)}
    shard(model, scenario)
    gathered = []
    for _, module in converted_modules(model):
        module.register_forward_pre_hook(lambda m, _: gathered.append(m.weight.packed))
    kept = []

    def keep(tensor):
        if tuple(tensor.shape) in shapes and not isinstance(tensor, GatheredTernary):
            kept.append(f"{tensor.dtype} {tuple(tensor.shape)}")
        return tensor

    with Collectives() as step, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = model(input_ids=batch(0), labels=batch(0)).loss
        held = [packed.untyped_storage().size() for packed in gathered]
        loss.backward()
    return {"weights": weights, "bytes": step.bytes, "kept": kept, "held": held}


def edited():
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


def refused():
    """What a forward says: masters gathered in bf16, a module in shards, λ below 1 too late."""
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
    model = build(Scenario())
    shard(model, Scenario())
    set_quantization(model, 0.5)
    try:
        model(input_ids=batch(0))
    except ConfigError as error:
        messages["blended late"] = str(error)
    return messages


def state_round_trip():
    """A gathered state dict is the dense model's, keys and values."""
    model = build(Scenario())
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    shard(model, Scenario())
    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return list(gathered) == list(expected) and all(
        torch.equal(gathered[name], expected[name]) for name in expected
    )


def main(rank, world, store):
    """What one rank found, as every other one did."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    results = {}
    for name in SCENARIOS if world == 2 else OF_FOUR:
        torch._dynamo.reset()
        results[name] = run(SCENARIOS[name], rank, world)
    results["counted"] = counted()
    if world == 2:
        results["state dict"] = state_round_trip()
        results["edited"] = edited()
        results["refused"] = refused()
    dist.destroy_process_group()
    return results
