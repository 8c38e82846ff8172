"""The small model, tokenizer and chat template that readers write and damage."""

import random

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from sparse_bitnet.data.tokenizer import train_bpe
from sparse_bitnet.nn import convert
from sparse_bitnet.train.presets import preset_config

VOCABULARY = 300
TOKENS = torch.arange(20).view(2, 10)
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' and m.content | length > 90 %}"
    "{{ raise_exception('too long') }}{% endif %}{{ '<' + m.role + '>' + m.content | trim }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
PIECES = [
    *["{{", "}}", "{%", "%}", "for", "endfor", "if", "messages", "m.content", "[0]", "|", "trim"],
    *["loop", "range(9)", "9", "'", "__class__", ".", "(", ")", "+", "*", "raise_exception('x')"],
    *["tools", "undefined_name", "1 / 0", "m.role.x.y", "{# #}", "| tojson", "| sum", "\ud800"],
]


def tokenizer(template=None):
    made = train_bpe(["some text to learn from, and then some more of it"], VOCABULARY)
    made.chat_template = template
    return made


def spoil_template(directory, mutation):
    """Put pieces of templates into the directory's, beside what else was damaged."""
    rng = random.Random(mutation.told)
    path = directory / "chat_template.jinja"
    if mutation.told != "nothing" and path.is_file() and not path.is_symlink():
        text = path.read_bytes().decode("utf-8", "surrogateescape")
        for _ in range(rng.choice([1, 1, 3])):
            place = rng.randrange(len(text) + 1)
            text = text[:place] + rng.choice(PIECES) + text[place + rng.choice([0, 0, 1, 9]) :]
        path.write_bytes(text.encode("utf-8", "surrogatepass"))


def model(pattern="6:8", config=None):
    """Of the preset ``tiny`` or a config, converted unless the pattern is None."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config or preset_config("tiny", VOCABULARY))
    if pattern is not None:
        convert(made, pattern)
    return made.eval()


def gguf_config(layers, **settings):
    """Rows of 256, the block of GGUF's ternary types."""
    return Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        **settings,
    )
