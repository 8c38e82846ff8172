"""Fixtures: tiny models, trained and packed directories. Nothing here is really trained."""

import json
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import tiny_models
from processes import FreshPython
from sparse_bitnet.nn import convert
from sparse_bitnet.packed.write import pack
from sparse_bitnet.train import SparsityConfig, save_trained

SMALL = tiny_models.SIZES | {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0}
SIZES = {
    "qwen2": {"tie_word_embeddings": True},
    "qwen2-untied": {"tie_word_embeddings": False},
    "mixtral": tiny_models.OWN_SIZES["mixtral"],
    "qwen2-moe": tiny_models.OWN_SIZES["qwen2_moe"]
    | {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
}


def build_model(architecture):
    """A model of that architecture with random weights, biases and norms, not yet converted."""
    torch.manual_seed(0)
    kind = architecture.removesuffix("-untied").replace("-", "_")
    config = AutoConfig.for_model(kind, **SMALL | SIZES.get(architecture, {}))
    model = AutoModelForCausalLM.from_config(config)
    tiny_models.randomize_vectors(model)
    return model.eval()


def write_trained(directory, tokenizer, **sizes):
    """A random Qwen2 in 6:8 as ``train`` leaves it, with a row of embeddings for each token."""
    sizes = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id} | sizes
    model = tiny_models.tiny(**sizes)
    convert(model, "6:8")
    return save_trained(model, tokenizer, directory, SparsityConfig())


def trained_model(architecture, pattern="6:8", **options):
    model = build_model(architecture)
    convert(model, pattern, **options)
    return model


@torch.no_grad()
def model_logits(model, rows=2, length=20):
    torch.manual_seed(1)
    return model(torch.randint(0, 300, (rows, length))).logits


def make_tokenizer():
    """A byte-level BPE of 300 tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(["def main():\n    return the name of the file\n"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")


def read_tensor_header(path):
    """The JSON header of a safetensors file, and the bytes behind it."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_tensor_header(path, header, data):
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit_json_file(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


# Loads what it is told to, without this package. Not compiled: that takes longer than it saves.
STOCK = """
import os, sys
os.environ["TORCHDYNAMO_DISABLE"] = "1"
import torch
from transformers import AutoModelForCausalLM
for line in sys.stdin:
    directory, out = line.split()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        torch.save(model(torch.randint(0, 300, (2, 20))).logits, out)
    assert "sparse_bitnet" not in sys.modules
    print("done", flush=True)
"""


def fixed(value):
    """A fixture that is always this."""
    return pytest.fixture(scope="session")(lambda: value)


build, trained, logits = fixed(build_model), fixed(trained_model), fixed(model_logits)
read_header, write_header = fixed(read_tensor_header), fixed(write_tensor_header)
edit_json = fixed(edit_json_file)


def fresh_python(preload):
    """A fixture that runs scripts where nothing else has been imported."""

    @pytest.fixture(scope="session")
    def fresh(tmp_path_factory):
        directory = tmp_path_factory.mktemp("fresh")
        python = FreshPython(directory, preload, HF_MODULES_CACHE=str(directory / "modules"))
        yield python
        python.close()

    return fresh


only_torch = fresh_python("import torch")
only_transformers = fresh_python("from transformers import AutoModelForCausalLM, Qwen2Model")


@pytest.fixture(scope="session")
def stock(tmp_path_factory):
    """Logits that stock transformers computes from a directory, in a process of its own."""
    out = tmp_path_factory.mktemp("stock") / "logits.pt"
    process = subprocess.Popen(
        [sys.executable, "-c", STOCK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def run(directory):
        process.stdin.write(f"{directory} {out}\n")
        process.stdin.flush()
        assert process.stdout.readline() == "done\n"
        return torch.load(out, weights_only=True)

    yield run
    process.stdin.close()
    process.wait()


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def pristine(tmp_path_factory, tokenizer):
    """Packed directories that no test may change: two-bit, trits, and one of two shards."""
    root = tmp_path_factory.mktemp("packed")
    model = trained_model("qwen2")
    pack(model, root / "two-bit", tokenizer=tokenizer)
    pack(model, root / "trits", storage="trits", tokenizer=tokenizer)
    pack(model, root / "sharded", tokenizer=tokenizer, shard_bytes=40_000)
    return root


@pytest.fixture
def packed(pristine, tmp_path):
    """A copy of a packed directory that a test may damage."""

    def copy(name="two-bit"):
        target = tmp_path / name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(pristine / name, target)
        return target

    return copy


def pack_readable(path, template, context, tokenizer):
    """A packed model that can chat, with room for long answers and nothing that ends them."""
    model = trained_model("qwen2-untied")
    with torch.no_grad():  # says what can be read
        for token in range(300):
            if not (0 < token < len(tokenizer) and tokenizer.decode([token]).isascii()):
                model.lm_head.weight[token] = 0
    model.config.max_position_embeddings = context
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    tokenizer.chat_template = template
    pack(model, path, tokenizer=tokenizer)
    tokenizer.chat_template = None
    return path
