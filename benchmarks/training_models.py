"""The rows of the training benchmark: one set of master weights, a model for each way to train it.

All rows share parameters, gradients and optimizer moments, so they fit on one GPU together and take
turns there.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparse_bitnet.core import Method, Pattern
from sparse_bitnet.nn import convert
from sparse_bitnet.train.loss import CausalLoss
from sparse_bitnet.train.parallel import blocks, compile_blocks
from sparse_bitnet.train.presets import preset_config

FAKE = "fake-quant"
FULL = "bf16"
PLAIN = "plain-compile"


@dataclass(frozen=True)
class Row:
    """One way to train: ``bf16``, ``fake-quant 6:8``, or ours: ``6:8``, ``dense fp8`` …"""

    name: str
    pattern: str
    kind: str
    method: Method = field(default_factory=Method)
    options: bool = True
    """Compile with the package's options for ternary layers."""

    @staticmethod
    def parse(name: str) -> Row:
        """Read a row's name.

        Raises:
            ValueError: if it is none.
        """
        first, *words = name.split()
        if name == FULL:
            return Row(name, "dense", FULL)
        if first == FAKE and len(words) == 1:
            return Row(name, str(Pattern.parse(words[0])), FAKE)
        if set(words) - {"fp8", PLAIN}:
            forms = "bf16, fake-quant N:M, and N:M or dense [fp8] [plain-compile]"
            raise ValueError(f"row {name!r} is none of: {forms}")
        method = Method(backward="fp8" if "fp8" in words else "full")
        pattern = str(Pattern.parse(first))
        return Row(name, pattern, "ours", method, PLAIN not in words)


class FakeQuantLinear(nn.Linear):
    """How published BitNet code trains: weight and input quantized in floating point, each forward.

    The straight-through estimator is v + (quantized − v).detach(), for both. Source: "The Era of
    1-bit LLMs: Training Tips, Code and FAQ" (Microsoft, 2024), with the mask of arXiv 2603.05168.
    """

    def __init__(self, linear: nn.Linear, pattern: Pattern) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.pattern = linear.weight, linear.bias, pattern

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        gamma = w.detach().abs().mean().clamp(min=1e-5)
        ternary = (w.detach() / gamma).round().clamp(-1, 1) * gamma
        if not self.pattern.is_dense:
            ternary = ternary * _mask(w.detach(), self.pattern)
        scale = 127.0 / x.detach().abs().amax(-1, keepdim=True).clamp(min=1e-5)
        rounded = (x.detach() * scale).round().clamp(-128, 127) / scale
        return F.linear(x + (rounded - x).detach(), w + (ternary - w).detach(), self.bias)


def _mask(weight: Tensor, pattern: Pattern) -> Tensor:
    """``core.nm_mask`` as one expression, which the compiler makes one kernel of."""
    magnitude = weight.abs().unflatten(-1, (-1, pattern.m))
    lane = torch.arange(pattern.m, device=weight.device)
    own, other = magnitude.unsqueeze(-1), magnitude.unsqueeze(-2)
    ahead = (other > own) | ((other == own) & (lane.unsqueeze(0) < lane.unsqueeze(1)))
    return (ahead.sum(-1) < pattern.n).flatten(-2)


def base_model(preset: str, vocabulary: int | None, device: torch.device) -> PreTrainedModel:
    """The float32 model whose parameters all rows share."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            preset_config(preset, vocabulary), dtype=torch.float32, attn_implementation="sdpa"
        )
    return model.train()


class Candidate:
    """A row's model over the shared parameters."""

    def __init__(self, row: Row, base: PreTrainedModel, compile: bool) -> None:
        self.row = row
        # Its modules are its own, its tensors those of the base.
        tensors = [*base.parameters(), *base.buffers()]
        model: PreTrainedModel = copy.deepcopy(base, {id(t): t for t in tensors})
        if row.kind == "ours":
            convert(model, row.pattern, method=row.method)
        elif row.kind == FAKE:
            for block in blocks(model):
                for name, module in list(block.named_modules()):
                    if type(module) is nn.Linear:
                        new = FakeQuantLinear(module, Pattern.parse(row.pattern))
                        block.set_submodule(name, new)
        self.loss_of = CausalLoss(model)
        if compile and row.options:
            compile_blocks(model)
        elif compile:
            for block in blocks(model):
                block.compile()
