"""A packed directory of two shards, with tokenizer, plugin and generation config.

What loads keeps its N:M pattern and has finite, positive scales; with its ``config.json`` as it
was, it computes what the clean one did.
"""

import torch
import toy

from sparse_bitnet.nn.packed_module import PackedModule, find_violation
from sparse_bitnet.packed.load import load_with_tokenizer
from sparse_bitnet.packed.write import pack
from sparse_bitnet.serve.generate import generate_text

expected = {}


def build(directory):
    pack(toy.model(), directory, tokenizer=toy.tokenizer(), shard_bytes=60_000)


@torch.no_grad()
def read(directory, mutation):
    loaded, tokenizer = load_with_tokenizer(directory, device="cpu")
    for module in loaded.modules():
        if isinstance(module, PackedModule):
            for name in module.weight_shapes:
                assert find_violation(module.unpack(name), module.spec.pattern) is None
                scale = module.get_buffer(f"{name}_scale")
                assert scale.isfinite().all() and (scale > 0).all()
    if "config.json" not in mutation.touched:
        logits = loaded(toy.TOKENS).logits
        assert torch.equal(expected.setdefault("logits", logits), logits), "computes something else"
    if mutation.touched & {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}:
        generate_text(loaded, tokenizer, "some", max_new_tokens=2)
