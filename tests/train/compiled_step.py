"""Largest relative error of a parameter's gradient, compiled by ``compile_blocks`` against eager.

Started by test_compiled.py in processes of their own: PyTorch reads the processor once.
"""

import copy
import sys

import torch
from transformers import AutoModelForCausalLM

from sparse_bitnet.nn import convert
from sparse_bitnet.train.parallel import compile_blocks
from sparse_bitnet.train.presets import preset_config


class Passed(torch.nn.Module):
    """In the place of attention, whose code takes longer to compile than the rest."""

    def forward(self, hidden_states, **_):
        return hidden_states, None


def main(kind, precision, part="block"):
    torch.manual_seed(0)
    config = preset_config("tiny", 64)
    config.num_hidden_layers = 1  # all layers are compiled alike
    eager = AutoModelForCausalLM.from_config(config)
    convert(eager, "6:8", kind=kind)
    if part == "mlp":
        eager.model.layers[0].self_attn = Passed()
    compiled = copy.deepcopy(eager)
    compile_blocks(compiled)
    tokens = torch.randint(64, (4, 32))
    for model in (eager, compiled):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            model(tokens, labels=tokens, use_cache=False).loss.backward()
    pairs = zip(compiled.parameters(), eager.parameters(), strict=True)
    print(max(((p.grad - q.grad).norm() / q.grad.norm()).item() for p, q in pairs))


if __name__ == "__main__":
    main(*sys.argv[1:])
