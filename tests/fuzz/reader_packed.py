"""A packed directory of two shards, with tokenizer, plugin and generation config.

What loads keeps its N:M pattern and has finite, positive scales; with its ``config.json`` as it
was, it computes what the clean one did.
"""

from pathlib import Path
from typing import Any

import torch

from sparse_bitnet.data.tokenizer import train_bpe
from sparse_bitnet.nn import convert
from sparse_bitnet.nn.packed_module import PackedModule, find_violation
from sparse_bitnet.packed.load import load_with_tokenizer
from sparse_bitnet.packed.write import pack
from sparse_bitnet.serve.generate import generate_text
from sparse_bitnet.train.presets import preset_config

TOKENS = torch.arange(20).view(2, 10)
expected: dict[str, torch.Tensor] = {}


def model() -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(preset_config("tiny", 300))
    convert(made, "6:8")
    return made.eval()


def build(directory: Path) -> None:
    tokenizer = train_bpe(["some text to learn from, and then some more of it"], 300)
    pack(model(), directory, tokenizer=tokenizer, shard_bytes=60_000)


@torch.no_grad()
def read(directory: Path, mutation: Any) -> None:
    loaded, tokenizer = load_with_tokenizer(directory, device="cpu")
    for module in loaded.modules():
        if isinstance(module, PackedModule):
            for name in module.weight_shapes:
                assert find_violation(module.unpack(name), module.spec.pattern) is None
                scale = module.get_buffer(f"{name}_scale")
                assert scale.isfinite().all() and (scale > 0).all()
    if "config.json" not in mutation.touched:
        logits = loaded(TOKENS).logits
        assert torch.equal(expected.setdefault("logits", logits), logits), "computes something else"
    if mutation.touched & {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}:
        generate_text(loaded, tokenizer, "some", max_new_tokens=2)
