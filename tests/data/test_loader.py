import hashlib
import shutil
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_bitnet.core.errors import ConfigError, DataError
from sparse_bitnet.data import Loader, TokenShards
from sparse_bitnet.data.loader import _permute
from sparse_bitnet.data.shards import Shard, index_text


def tokens(loader, step):
    """The windows of a batch of text."""
    batch = loader.batch(step)
    assert batch.positions is None and batch.divisor is None
    assert torch.equal(batch.inputs[:, 1:], batch.labels[:, :-1])
    return torch.cat([batch.inputs, batch.labels[:, -1:]], dim=1)


def write_shards(path, tokens, cut=1000):
    """Shards with exactly these tokens, ``cut`` in a file."""
    path.mkdir(parents=True)
    shards = []
    for number, start in enumerate(range(0, len(tokens), cut)):
        piece = tokens[start : start + cut].astype("<u4")
        piece.tofile(path / f"{number:05d}.bin")
        digest = hashlib.sha256(piece.tobytes()).hexdigest()
        shards.append(Shard(f"{number:05d}.bin", len(piece), 1, 1, digest))
    text = index_text(shards, tokenizer_hash="a" * 64, vocab_size=1 << 20, eos_id=0)
    (path / "index.json").write_text(text)
    return TokenShards(path)


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    """Three sources whose token values tell where they stand: 0…, 100000…, 200000…"""
    root = tmp_path_factory.mktemp("counting")
    sizes = (5003, 1501, 810)
    return [
        write_shards(root / str(i), np.arange(size) + 100_000 * i) for i, size in enumerate(sizes)
    ]


def test_an_epoch_reads_every_window_once_in_a_new_order(counting):
    length, batch = 10, 25
    loader = Loader(counting[0], length, batch, seed=3)
    windows = (5003 - 1) // length  # 500: twenty batches of 25
    assert loader.windows == [windows]
    epochs = []
    for epoch in range(3):
        rows = torch.cat([tokens(loader, 20 * epoch + step) for step in range(20)])
        assert rows.shape == (windows, length + 1) and rows.dtype == torch.long
        assert (rows.diff(dim=1) == 1).all()  # each row is consecutive tokens, across shards too
        epochs.append(rows[:, 0].tolist())
        assert sorted(epochs[-1]) == [length * i for i in range(windows)]
    assert epochs[0] != epochs[1] != epochs[2] != sorted(epochs[2])
    for one, other in combinations(epochs, 2):  # no window keeps its place, but by chance
        assert sum(a == b for a, b in zip(one, other, strict=True)) < 8


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(-(2**70), 2**70),
    step=st.integers(0, 2**33),
    quarter=st.integers(1, 4),
    weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=3),
)
def test_the_global_order_does_not_depend_on_ranks(counting, seed, step, quarter, weights):
    mixture = list(zip(counting, weights, strict=False))

    def batch(rank, world_size):
        return tokens(Loader(mixture, 7, 4 * quarter, seed, rank, world_size), step)

    whole = batch(0, 1)
    assert whole.shape == (4 * quarter, 8)
    for world_size in (2, 4):
        parts = [batch(rank, world_size) for rank in range(world_size)]
        assert torch.equal(torch.cat(parts), whole)


def test_order_depends_on_the_seed_and_the_step(counting):
    first = tokens(Loader(counting[0], 10, 16, seed=0), 5)
    assert torch.equal(first, tokens(Loader(counting[0], 10, 16, seed=0), 5))
    assert not torch.equal(first, tokens(Loader(counting[0], 10, 16, seed=1), 5))
    assert not torch.equal(first, tokens(Loader(counting[0], 10, 16, seed=0), 6))


def test_the_order_is_the_one_committed(counting):
    """A change of these numbers breaks the resumption of every run there is."""
    mixture = [(counting[0], 3), (counting[1], 1)]
    starts = [tokens(Loader(mixture, 10, 4, seed=7), step)[:, 0].tolist() for step in (0, 1, 1000)]
    assert starts == [
        [100360, 4510, 370, 4000],
        [100330, 30, 2840, 2130],
        [101040, 2240, 2320, 750],
    ]


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (0.7, 0.2, 0.1), (1, 2, 4), (1e-3, 1)])
def test_mixture_proportions(counting, weights):
    mixture = list(zip(counting, weights, strict=False))
    loader = Loader(mixture, 4, 8, seed=0)
    counts = Counter()
    samples = 0
    for step in range(250):
        counts.update((tokens(loader, step)[:, 0] // 100_000).tolist())
        samples += 8
        for source, weight in enumerate(weights):  # at every step, not only in the long run
            exact = samples * weight / sum(weights)
            assert abs(counts[source] - exact) < len(weights)


@settings(deadline=None, max_examples=50)
@given(
    weights=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=3),
    first=st.integers(0, 2**50),
)
def test_places_count_up(counting, weights, first):
    """Over consecutive samples each source counts 0, 1, 2, … without gap or repetition."""
    loader = Loader(list(zip(counting, weights, strict=False)), 4, 1)
    following = {}
    for sample in range(first, first + 60):
        source, k = loader._place(sample)
        assert following.setdefault(source, k) == k
        following[source] = k + 1


def test_mixture_sources_keep_their_own_epochs(counting):
    loader = Loader([(counting[0], 1), (counting[2], 1)], 10, 2, seed=1)
    rows = torch.cat([tokens(loader, step) for step in range(3 * 80)])
    small = [start for start in rows[:, 0].tolist() if start >= 100_000]
    assert len(small) == 3 * 80 and set(Counter(small).values()) == {3}


@settings(deadline=None, max_examples=150)
@given(count=st.integers(1, 2000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(count, key):
    positions = np.arange(count, dtype=np.uint64)
    out = _permute(positions, count, np.full(count, key, dtype=np.uint64))
    assert sorted(out.tolist()) == list(range(count))


def test_permute_at_the_size_of_terabytes():
    count = 10**13 + 7
    positions = np.arange(10_000, dtype=np.uint64) + np.uint64(count - 10_000)
    out = _permute(positions, count, np.full(10_000, 5, dtype=np.uint64))
    assert out.max() < count and len(set(out.tolist())) == 10_000


@pytest.mark.parametrize("count", [5, 24, 97])
def test_permutations_are_uniform(count):
    """χ² of where each position goes over many keys; and neighbours do not stay neighbours."""
    keys = np.arange(4000, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    table = np.zeros((count, count))
    for position in range(count):
        places = _permute(np.full(4000, position, dtype=np.uint64), count, keys)
        table[position] = np.bincount(places.astype(np.int64), minlength=count)
    expected = 4000 / count
    chi2 = ((table - expected) ** 2 / expected).sum()
    freedom = (count - 1) ** 2  # rows and columns both have fixed sums
    assert abs(chi2 - freedom) < 5 * np.sqrt(2 * freedom)
    order = _permute(np.arange(count, dtype=np.uint64), count, np.full(count, 1, np.uint64))
    assert (np.diff(order.astype(np.int64)) == 1).sum() < max(3, count / 10)


def test_ranks_that_do_not_divide_the_batch(counting):
    with pytest.raises(ConfigError, match="batch_size is 6: it must be a multiple of the 4 ranks"):
        Loader(counting[0], 10, 6, world_size=4)


def test_shards_shorter_than_a_window(counting):
    assert tokens(Loader(counting[2], 809, 1), 9).shape == (1, 810)
    with pytest.raises(
        DataError, match="810 tokens, fewer than one window of 811; use a shorter d"
    ):
        Loader(counting[2], 810, 1)


def test_mixture_of_two_vocabularies(counting, tmp_path):
    other = Path(shutil.copytree(counting[0].path, tmp_path / "other"))
    index = (other / "index.json").read_text().replace("a" * 64, "b" * 64)
    (other / "index.json").write_text(index)
    with pytest.raises(DataError, match="other: shard of the wrong vocabulary"):
        Loader([(counting[0], 1), (TokenShards(other), 1)], 10, 4)


def test_prepared_text_comes_out(prepared):
    shards = TokenShards(prepared / "train")
    loader = Loader(shards, 32, 8)
    seen = {tuple(row) for step in range(4000 // 8) for row in tokens(loader, step).tolist()}
    everything = shards.tokens(0, shards.total_tokens)
    possible = {tuple(everything[i * 32 : i * 32 + 33]) for i in range(loader.windows[0])}
    assert seen <= possible
