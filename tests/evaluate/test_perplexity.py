import hashlib
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_bitnet.core import ConfigError, DataError, WeightError
from sparse_bitnet.data import TokenShards, open_source, prepare
from sparse_bitnet.data.shards import Shard, index_text, token_dtype
from sparse_bitnet.data.tokenizer import train_bpe
from sparse_bitnet.evaluate import Perplexity, perplexity, scoring
from sparse_bitnet.nn.head import has_plain_head
from tiny_models import tiny

VOCAB = 320


def random_tokens(count, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, count)


@torch.no_grad()
def one_by_one(model, tokens, window, stride):
    """The definition, a token at a time: the longest context its window gives it."""
    total = 0.0
    for target in range(1, len(tokens)):
        start = 0
        while start + window < target:  # the window's input does not reach the token before
            start += stride
        start = min(start, max(0, len(tokens) - 1 - window))
        context = torch.tensor(tokens[start:target]).unsqueeze(0)
        logits = model(input_ids=context).logits[0, -1].double()
        total -= logits.log_softmax(-1)[int(tokens[target])].item()
    return total / (len(tokens) - 1)


@settings(deadline=None, max_examples=12)
@given(
    count=st.integers(2, 30),
    window=st.integers(1, 16),
    stride=st.integers(1, 16),
    batch_size=st.integers(1, 5),
)
def test_equals_scoring_each_token_separately(model, count, window, stride, batch_size):
    stride = min(stride, window)
    tokens = random_tokens(count)
    found = perplexity(model, tokens, window=window, stride=stride, batch_size=batch_size)
    assert found.tokens == count - 1
    assert found.loss == pytest.approx(one_by_one(model, tokens, window, stride), rel=1e-5)


@pytest.mark.parametrize("name", ["model", "ternary_model"])
def test_batch_size_does_not_matter(name, request):
    model = request.getfixturevalue(name)
    tokens = random_tokens(200)
    losses = [
        perplexity(model, tokens, window=16, stride=8, batch_size=size).loss
        for size in (1, 3, 25, None)
    ]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)


def test_stride_of_a_window_is_hugging_faces_loss(model):
    tokens = torch.from_numpy(random_tokens(4 * 16 + 1))
    windows = torch.stack([tokens[start : start + 17] for start in range(0, 64, 16)])
    with torch.no_grad():
        expected = model(input_ids=windows, labels=windows).loss.item()
    assert perplexity(model, tokens, window=16, stride=16).loss == pytest.approx(expected, rel=1e-6)


def test_windows_are_those_of_the_picture(model):
    seen = []
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: seen.append(args[0].tolist())
    )
    perplexity(model, np.arange(13), window=6, stride=2, batch_size=8)
    hook.remove()
    assert seen[-1] == [list(range(first, first + 6)) for first in (0, 2, 4, 6)]


@pytest.mark.parametrize("logits", [VOCAB, 7 * VOCAB])
def test_head_in_pieces(model, monkeypatch, logits):
    tokens = random_tokens(100)
    whole = perplexity(model, tokens, window=16, stride=8)
    monkeypatch.setitem(scoring.LOGITS_AT_ONCE, "cpu", logits)
    largest = []
    hook = model.lm_head.register_forward_hook(
        lambda module, args, out: largest.append(out.numel())
    )
    pieces = perplexity(model, tokens, window=16, stride=8)
    hook.remove()
    assert pieces.loss == pytest.approx(whole.loss, rel=1e-6)
    assert len(largest) > 1
    assert max(largest[1:]) <= logits  # the first are the two tokens of `has_plain_head`


@pytest.mark.parametrize("initializer_range", [0.02, 0.5])
def test_architecture_that_caps_its_logits(initializer_range):
    options = {"initializer_range": initializer_range, "final_logit_softcapping": 5.0}
    model = tiny("gemma2", vocab_size=VOCAB, **options).eval()
    tokens = random_tokens(30)
    assert not has_plain_head(model)
    found = perplexity(model, tokens, window=16, stride=8, batch_size=2)
    assert found.loss == pytest.approx(one_by_one(model, tokens, 16, 8), rel=1e-5)


def test_architecture_with_another_body_name():
    model = tiny("gpt2", vocab_size=VOCAB).eval()
    tokens = random_tokens(30)
    assert has_plain_head(model)
    found = perplexity(model, tokens, window=8, stride=4)
    assert found.loss == pytest.approx(one_by_one(model, tokens, 8, 4), rel=1e-5)


def test_modes_and_gradients_are_left_alone(model):
    model.train()
    model.model.layers[0].eval()
    try:
        perplexity(model, random_tokens(20))
        assert model.training
        assert model.lm_head.training
        assert not model.model.layers[0].training
        assert model.lm_head.weight.grad is None
    finally:
        model.eval()


def test_half_the_batch_when_memory_runs_out(model, capsys):
    tokens = random_tokens(200)
    expected = perplexity(model, tokens, window=16, stride=8, batch_size=2).loss
    rows = []

    def room_for_64_tokens(module, args, kwargs):
        rows.append(len(kwargs["input_ids"]))
        if kwargs["input_ids"].numel() > 64:
            raise torch.OutOfMemoryError("pretend")

    hook = model.model.register_forward_pre_hook(room_for_64_tokens, with_kwargs=True)
    try:
        found = perplexity(model, tokens, window=16, stride=8, batch_size=18)
    finally:
        hook.remove()
    assert found.loss == pytest.approx(expected, rel=1e-6)
    assert found.tokens == 199
    assert rows[1:5] == [18, 9, 4, 4]  # after the one of `has_plain_head`
    assert "out of memory: going on with a batch of 4" in capsys.readouterr().err


def test_a_single_window_that_does_not_fit():
    def full(start, end):
        raise torch.OutOfMemoryError("pretend")

    with pytest.raises(ConfigError, match=r"single window does not fit .* shorter window"):
        scoring.in_batches(8, 4, full)


def test_figures_and_line():
    found = Perplexity.of(nats=20 * math.log(8), tokens=20, text_bytes=40)
    assert found.loss == pytest.approx(math.log(8))
    assert found.perplexity == pytest.approx(8)
    assert found.bits_per_byte == pytest.approx(1.5)
    assert str(found) == (
        "perplexity 8.00 (loss 2.0794 nats/token, 1.5000 bits/byte) over 20 tokens"
    )
    assert Perplexity.of(5000.0, 2).perplexity == math.inf
    assert Perplexity.of(10.0, 5).bits_per_byte is None


def test_uniform_model_has_the_vocabulary_as_perplexity(model):
    class Flat(torch.nn.Module):
        def forward(self, x):
            return x.new_zeros(*x.shape[:-1], VOCAB)

    head = model.lm_head
    model.lm_head = Flat()
    try:
        assert perplexity(model, random_tokens(50)).perplexity == pytest.approx(VOCAB, rel=1e-6)
    finally:
        model.lm_head = head


def test_text_files(model, tokenizer, prose, tmp_path):
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text(prose, encoding="utf-8")
    second.write_text("Größe: 3 µm\n", encoding="utf-8")
    eos = tokenizer.eos_token_id
    ids = [eos]
    for path in (first, second):
        ids += [*tokenizer(path.read_text(encoding="utf-8"))["input_ids"], eos]
    expected = perplexity(model, np.array(ids), window=32)
    source = open_source(f"text:{tmp_path}")
    found = perplexity(model, source, tokenizer=tokenizer, window=32)
    assert found.loss == pytest.approx(expected.loss, rel=1e-7)
    assert found.tokens == len(ids) - 1
    assert found.bytes == first.stat().st_size + second.stat().st_size
    bits = found.loss * found.tokens / math.log(2)
    assert found.bits_per_byte == pytest.approx(bits / found.bytes)


def test_limit_scores_the_first_tokens(model, tokenizer, tmp_path, prose):
    tokens = random_tokens(100)
    found = perplexity(model, tokens, window=16, limit=30)
    assert found == perplexity(model, tokens[:31], window=16)
    (tmp_path / "a.txt").write_text(prose, encoding="utf-8")
    source = open_source(f"text:{tmp_path}")
    for limit, known in ((10, None), (10_000, len(prose.encode()))):
        found = perplexity(model, source, tokenizer=tokenizer, limit=limit)
        assert found.bytes == known and found.tokens == (10 if known is None else found.tokens)


@pytest.fixture(scope="module")
def shards(tokenizer, prose, tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    (path / "a.txt").write_text(prose, encoding="utf-8")
    tokenizer.save_pretrained(path / "tokenizer")
    prepare(
        f"text:{path / 'a.txt'}",
        path / "out",
        tokenizer=str(path / "tokenizer"),
        validation=0,
        workers=1,
    )
    return TokenShards(path / "out" / "train")


def test_token_shards(model, tokenizer, prose, shards):
    found = perplexity(model, shards, tokenizer=tokenizer, window=16)
    tokens = shards.tokens(0, shards.total_tokens)
    alike = perplexity(model, tokens, window=16)
    assert (found.loss, found.tokens) == (alike.loss, alike.tokens)
    assert found.bytes == len(prose.encode())


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Documents of 2 to 40 tokens, about half of each an answer, in files of any length."""
    directory, rng = tmp_path_factory.mktemp("chats"), np.random.default_rng(5)
    parts = []
    for length in rng.integers(2, 41, 30):
        part = np.zeros(length, token_dtype(VOCAB, answers=True))
        part["id"] = rng.integers(0, VOCAB, length)
        part["answer"][1:] = rng.integers(0, 2, length - 1)
        part["answer"][-1], part["first"][0] = 1, 1
        parts.append(part)
    shards = []
    for number, piece in enumerate(np.array_split(np.concatenate(parts), 3)):
        piece.tofile(directory / f"{number}.bin")
        digest = hashlib.sha256(piece.tobytes()).hexdigest()
        shards.append(Shard(f"{number}.bin", len(piece), 1, 1, digest))
    known = {"tokenizer_hash": "0" * 64, "vocab_size": VOCAB, "eos_id": 0}
    (directory / "index.json").write_text(index_text(shards, **known, answers=True))
    return TokenShards(directory)


@torch.no_grad()
def answers_one_by_one(model, chats, window, stride):
    """Nats of each token of an answer, given what its window shows of its conversation alone."""
    starts = [*chats.document_starts().tolist(), chats.total_tokens]
    nats = []
    for begin, end in itertools.pairwise(starts):
        ids, learned = chats.tokens(begin, end - begin), chats.marks([begin], end - begin)[0][0]
        for target in np.flatnonzero(learned):
            start = 0
            while start + window < target:
                start += stride
            start = min(start, max(0, len(ids) - 1 - window))
            logits = model(input_ids=torch.tensor(ids[start:target]).unsqueeze(0)).logits[0, -1]
            nats.append(-logits.double().log_softmax(-1)[int(ids[target])].item())
    return nats


@pytest.mark.parametrize(("window", "stride"), [(64, 32), (7, 3), (1, 1)])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_conversations(model, chats, window, stride, batch_size):
    found = perplexity(model, chats, window=window, stride=stride, batch_size=batch_size)
    expected = answers_one_by_one(model, chats, window, stride)
    assert found.tokens == len(expected) and found.answers_only
    assert found.loss == pytest.approx(np.mean(expected), rel=1e-5)
    assert str(found).endswith(f"over {len(expected)} tokens of answers")
    assert found.bits_per_byte is None and found.bytes is None


@pytest.mark.parametrize("limit", [1, 17, 10_000])
def test_a_limit_counts_answers(model, chats, limit):
    found = perplexity(model, chats, window=7, stride=3, limit=limit)
    expected = answers_one_by_one(model, chats, 7, 3)
    assert found.tokens == min(limit, len(expected))
    if limit in (1, 10_000):  # where windows end elsewhere, another context is seen
        assert found.loss == pytest.approx(np.mean(expected[:limit]), rel=1e-5)


def test_shards_of_another_vocabulary_or_tokenizer(model, make_model, prose, shards):
    with pytest.raises(DataError, match=rf"{shards.vocab_size} tokens.* 32"):
        perplexity(make_model(vocab=32), shards)
    other = train_bpe([prose[::-1]], vocab_size=300)
    with pytest.raises(DataError, match="made by tokenizer"):
        perplexity(model, shards, tokenizer=other)


def test_ids_outside_the_vocabulary(model):
    tokens = random_tokens(50)
    tokens[37] = VOCAB
    with pytest.raises(DataError, match=f"id {VOCAB} at position 37 .* vocabulary of {VOCAB} ids"):
        perplexity(model, tokens, window=16)
    tokens[37] = -1
    with pytest.raises(DataError, match="token id -1 at position 37"):
        perplexity(model, torch.from_numpy(tokens), window=16, stride=16)


@pytest.mark.parametrize("count", [0, 1])
def test_too_short(model, count):
    with pytest.raises(DataError, match=f"too short, {count} token"):
        perplexity(model, random_tokens(count))


def test_arrays_that_are_no_tokens(model):
    with pytest.raises(DataError, match="one-dimensional array of integers"):
        perplexity(model, np.zeros(8))
    with pytest.raises(DataError, match=r"shape \(2, 4\)"):
        perplexity(model, np.zeros((2, 4), dtype=int))


def test_files_that_cannot_be_scored(model, tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.touch()
    with pytest.raises(ConfigError, match="text needs a tokenizer"):
        perplexity(model, open_source(f"text:{path}"))
    with pytest.raises(DataError, match=r"no text to score: text:.*a\.txt"):
        perplexity(model, open_source(f"text:{path}"), tokenizer=tokenizer)
    path.write_bytes(b"Gr\xf6sse")
    with pytest.raises(DataError, match=r"a\.txt: not UTF-8 .* at byte 2"):
        perplexity(model, open_source(f"text:{path}"), tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 65}, "window 65 is out of range: the model reads 1 to 64"),
        ({"window": 0}, "window 0 is out of range"),
        ({"window": 8, "stride": 9}, "stride 9 is out of range: 1 to the window, 8"),
        ({"stride": 0}, "stride 0 is out of range"),
        ({"limit": 0}, "limit 0 is out of range"),
        ({"batch_size": 0}, "--batch-size 0 is out of range"),
    ],
)
def test_options_out_of_range(model, options, message):
    with pytest.raises(ConfigError, match=message):
        perplexity(model, random_tokens(20), **options)


def test_damaged_weights(model):
    weight = model.model.norm.weight.data
    kept = weight.clone()
    weight[0] = math.nan
    try:
        with pytest.raises(WeightError, match="not finite: its weights are damaged"):
            perplexity(model, random_tokens(20))
    finally:
        weight.copy_(kept)
