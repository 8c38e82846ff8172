"""Choices of tokens against the probabilities that the options describe."""

import math
from collections import Counter

import pytest
import torch

from sparse_bitnet.serve.sampling import Sampler, SamplingOptions

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0, 0.5])


def drawn(count=4000, logits=LOGITS, **options):
    sampler = Sampler(SamplingOptions(max_tokens=1, **options))
    return Counter(sampler.choose(logits).id for _ in range(count))


def test_greedy():
    assert drawn(10) == {1: 10}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature(temperature):
    expected = (LOGITS / temperature).softmax(-1)
    found = drawn(temperature=temperature)
    for token, probability in enumerate(expected.tolist()):
        spread = math.sqrt(probability * (1 - probability) / 4000)
        assert abs(found[token] / 4000 - probability) < 5 * spread


def test_top_p():
    # Probabilities 0.61, 0.22, 0.08, …: the first two together are the first to reach 0.7.
    assert set(drawn(temperature=1.0, top_p=0.7)) == {1, 2}
    assert set(drawn(temperature=1.0, top_p=1e-9)) == {1}


def test_bias_and_penalties():
    assert set(drawn(10, logit_bias={3: 100.0})) == {3}
    assert 1 not in drawn(temperature=1.0, logit_bias={1: -100.0})
    sampler = Sampler(SamplingOptions(max_tokens=9, frequency_penalty=1.0, presence_penalty=0.5))
    counts = [0] * 5
    for _ in range(9):
        changed = [
            logit - 1.0 * count - 0.5 * (count > 0)
            for logit, count in zip(LOGITS.tolist(), counts, strict=True)
        ]
        token = sampler.choose(LOGITS).id
        assert token == max(range(5), key=changed.__getitem__)
        counts[token] += 1


def test_log_probabilities_are_the_models_own():
    sampler = Sampler(
        SamplingOptions(max_tokens=1, temperature=2.0, logit_bias={0: 50.0}, logprobs=2)
    )
    token = sampler.choose(LOGITS)
    logs = LOGITS.log_softmax(-1)
    assert token.id == 0 and token.logprob == pytest.approx(float(logs[0]))
    assert [id for id, _ in token.top] == [1, 2]
    assert [value for _, value in token.top] == pytest.approx(logs[[1, 2]].tolist())


def test_a_seed_repeats():
    def row(seed):
        sampler = Sampler(SamplingOptions(max_tokens=1, temperature=1.0, seed=seed))
        return [sampler.choose(LOGITS).id for _ in range(30)]

    assert row(3) == row(3) != row(4)
