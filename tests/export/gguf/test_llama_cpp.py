"""Stock llama.cpp on our GGUF files: same ids, same logits, same text.

llama.cpp rounds activations to eight bits by blocks of 256 where this package does by token, so
logits are compared twice: with ours, loosely, and tightly with our model given llama.cpp's rounding
(`like_llama_cpp`), which shows that nothing else differs.
"""

import copy
import random
import statistics
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import sparse_bitnet
from sparse_bitnet.data import TokenShards, prepare
from sparse_bitnet.data.tokenizer import train_bpe
from sparse_bitnet.export.gguf.tokenizer import LLAMA3_REGEX, QWEN2_REGEX
from sparse_bitnet.export.gguf.write import export_gguf
from sparse_bitnet.nn import SparseBitLinear, convert
from sparse_bitnet.serve.generate import generate_text
from sparse_bitnet.train import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    SparsityConfig,
    TrainConfig,
    load_trained,
    save_trained,
    train,
)
from tiny_models import randomize_vectors

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # two minutes of training, if idle
llama_cpp = pytest.importorskip("llama_cpp")

SOURCES = sorted(Path(sparse_bitnet.__file__).parent.rglob("*.py"))
FOREIGN = "naïve café “quotes” 🚀 Привет мир 日本語 123 4567 DON'T I've we'LL\r\n\n\n   x\t\ty"
ALPHABET = "aZ éß🚀日本Привет'’\"\n\r\t  0123456789ΑαⅫ½٣_-=+{}()\\/<>s\u200d\u00a0\u3000ﬁ"
CONFIGS = {
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "llama": LlamaConfig,
    "mistral": MistralConfig,
}
Q8_BLOCK = 256


def run(path, **options):
    """The file in llama.cpp, keys and values in float32 so that only what is named differs."""
    return closing(
        llama_cpp.Llama(
            str(path), n_ctx=256, n_threads=1, type_k=0, type_v=0, verbose=False, **options
        )
    )


def logits_there(path, ids):
    with run(path, logits_all=True) as model:
        model.eval(ids)
        return torch.from_numpy(np.array(model.scores[: len(ids)]))


class RoundedByBlock(torch.nn.Module):
    """A ternary layer as llama.cpp computes it: γ in fp16, activations in blocks of 256."""

    def __init__(self, layer):
        super().__init__()
        ternary, scale, _ = layer.derived()
        self.weight = ternary * scale.half().float()
        self.bias = layer.bias

    def forward(self, x):
        blocks = x.unflatten(-1, (-1, Q8_BLOCK))
        step = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        return F.linear((blocks / step).round().mul(step).flatten(-2), self.weight, self.bias)


def like_llama_cpp(model):
    """Our model with llama.cpp's roundings, in place."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, SparseBitLinear)]
    for name, layer in layers:
        model.set_submodule(name, RoundedByBlock(layer))
    with torch.no_grad():
        for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            weight.copy_(weight.half().float())
    return model


@pytest.fixture(scope="module")
def text():
    return [path.read_text() for path in SOURCES] + [FOREIGN] * 20


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("linears", ["tq2_0", "tq1_0"])
def test_logits_of_random_models(tmp_path, text, kind, linears):
    tokenizer = train_bpe(text, 500)
    torch.manual_seed(0)
    options = {"num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": None}
    options |= {"eos_token_id": 0, "pad_token_id": None, "num_attention_heads": 4}
    biases = {"attention_bias": True, "mlp_bias": True} if kind == "llama" else {}
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    biases |= {"rope_parameters": rope} if kind == "llama" else {}
    config = CONFIGS[kind](
        vocab_size=500,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        head_dim=64,
        tie_word_embeddings=kind == "qwen2",
        **options,
        **biases,
    )
    model = AutoModelForCausalLM.from_config(config)
    randomize_vectors(model)
    convert(model, "6:8")
    save_trained(model, tokenizer, tmp_path / "trained", SparsityConfig(pattern="6:8"))
    export_gguf(tmp_path / "trained", tmp_path / "m.gguf", linears=linears)
    model, _ = load_trained(tmp_path / "trained")
    ids = tokenizer(text[0]).input_ids[:192]
    # Floats added in another order turn a rounding of some token's activations over, now and then,
    # which moves the logits of all tokens after it. So: many short prompts, and their median.
    prompts = [ids[first : first + 8] for first in range(0, len(ids), 8)]
    there = [logits_there(tmp_path / "m.gguf", prompt) for prompt in prompts]
    rounded = like_llama_cpp(copy.deepcopy(model))
    from_ours, from_alike, spreads = [], [], []
    with torch.no_grad():
        for prompt, theirs in zip(prompts, there, strict=True):
            ours = model(torch.tensor([prompt])).logits[0]
            alike = rounded(torch.tensor([prompt])).logits[0]
            from_ours.append(float((theirs - ours).abs().mean()))
            from_alike.append(float((theirs - alike).abs().mean()))
            spreads.append(float(ours.std()))
    spread = statistics.median(spreads)
    print(
        f"{kind} {linears}: {statistics.mean(from_ours) / spread:.1e} of a logit's deviation from "
        f"ours, {statistics.median(from_alike) / spread:.1e} from its like"
    )
    assert statistics.mean(from_ours) < 0.03 * spread
    assert statistics.median(from_alike) < 0.0005 * spread


@pytest.fixture(scope="module")
def demo(tmp_path_factory, text):
    """A model of the demo's kind in rows of 256, trained on the sources of this package."""
    root = tmp_path_factory.mktemp("demo")
    (root / "text").mkdir()
    for number, document in enumerate(text[: len(SOURCES)]):
        (root / "text" / f"{number}.txt").write_text(document)
    prepare(f"text:{root / 'text'}", root / "data", vocab_size=1024, validation=0.05)
    shape = Qwen2Config(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        vocab_size=1024,
    )
    shape.save_pretrained(root)
    config = TrainConfig(
        data=DataConfig(path=str(root / "data"), sequence_length=128, batch_size=8),
        model=ModelConfig(source=str(root / "config.json")),
        sparsity=SparsityConfig("6:8"),
        optimizer=OptimizerConfig(learning_rate=2e-3),
        schedule=ScheduleConfig(steps=300),
        run=RunConfig(directory=str(root / "run"), checkpoint_every=300, precision="fp32"),
    )
    directory = train(config).model_directory
    export_gguf(directory, root / "demo.gguf")
    return directory, root / "demo.gguf", root / "data"


def test_logits_of_a_trained_model(demo):
    directory, path, data = demo
    ids = TokenShards(data / "validation").tokens(0, 250).astype("int64").tolist()
    there = logits_there(path, ids)
    model, _ = load_trained(directory)
    with torch.no_grad():
        ours = model(torch.tensor([ids])).logits[0]
        alike = like_llama_cpp(model)(torch.tensor([ids])).logits[0]
    spread = float(ours.std())
    same = float((there.argmax(-1) == ours.argmax(-1)).float().mean())
    print(
        f"trained: {float((there - ours).abs().mean()) / spread:.1e} from ours, "
        f"{float((there - alike).abs().mean()) / spread:.1e} from its like, best token {same:.3f}"
    )
    assert float((there - ours).abs().mean()) < 0.03 * spread
    assert float((there - alike).abs().mean()) < 0.002 * spread
    assert same > 0.95


def test_greedy_text_of_a_trained_model(demo):
    directory, path, _ = demo
    model, tokenizer = load_trained(directory)
    prompts = ["def ", "from sparse_bitnet.core import ", "class ", "    Raises:\n", "import "]
    ours = [generate_text(model, tokenizer, prompt, 24) for prompt in prompts]
    alike = like_llama_cpp(model)
    expected = [generate_text(alike, tokenizer, prompt, 24) for prompt in prompts]
    with run(path) as there:
        found = [
            there(prompt, max_tokens=24, temperature=0.0, repeat_penalty=1.0)["choices"][0]["text"]
            for prompt in prompts
        ]
    for prompt, one, two in zip(prompts, ours, found, strict=True):
        print(repr(prompt), repr(one), repr(two))
    assert found == expected
    assert sum(one == two for one, two in zip(ours, found, strict=True)) >= 3


def by_regex(regex):
    split = pre_tokenizers.Split(Regex(regex), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])


def byte_level(text, splitting, ignore_merges=False):
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer, backend.decoder = splitting, decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=1200,
        special_tokens=["<|end|>", "<s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(text, trainer)
    return backend, "<|end|>"


def sentence_piece(text):
    """What SentencePiece would give: all splits of a token are merges, in order of tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<unk>", "<s>", "</s>"]
    trainer = BpeTrainer(vocab_size=1200, special_tokens=special + bytes_, show_progress=False)
    backend.train_from_iterator(text, trainer)
    vocab = backend.get_vocab()
    merges = [
        (token[:cut], token[cut:])
        for token in sorted(vocab, key=vocab.get)
        for cut in range(1, len(token))
        if not token.startswith("<0x") and token[:cut] in vocab and token[cut:] in vocab
    ]
    bpe = models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    backend = Tokenizer(bpe)
    backend.add_special_tokens(special)
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    return backend, "</s>"


TOKENIZERS = {
    "qwen2": lambda text: byte_level(text, by_regex(QWEN2_REGEX)),
    "llama-bpe": lambda text: byte_level(text, by_regex(LLAMA3_REGEX), ignore_merges=True),
    "smaug-bpe": lambda text: byte_level(text, by_regex(LLAMA3_REGEX)),
    "gpt-2": lambda text: byte_level(text, pre_tokenizers.ByteLevel(False)),
    "smollm": lambda text: byte_level(
        text,
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]),
    ),
    "sentencepiece": sentence_piece,
}


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_the_same_ids(tmp_path, text, name):
    backend, end = TOKENIZERS[name](text)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, bos_token="<s>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = AutoModelForCausalLM.from_config(config)
    convert(model, "6:8")
    save_trained(model, tokenizer, tmp_path / "trained", SparsityConfig(pattern="6:8"))
    export_gguf(tmp_path / "trained", tmp_path / "m.gguf")
    rng = random.Random(0)
    texts = ["".join(rng.choices(ALPHABET, k=rng.randrange(1, 30))) for _ in range(2000)]
    with run(tmp_path / "m.gguf", vocab_only=True) as there:
        for one in [*text[:10], FOREIGN, *texts]:
            found = there.tokenize(one.encode(), add_bos=True, special=True)
            assert found == tokenizer(one).input_ids, repr(one)
        assert there.token_eos() == tokenizer.eos_token_id
        assert there.token_bos() == tokenizer.bos_token_id
        assert there.metadata["tokenizer.chat_template"] == tokenizer.chat_template
