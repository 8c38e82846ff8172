"""The engine without HTTP: the same tokens alone, in a batch, and as transformers' generate."""

import asyncio

import pytest
import torch

from decoders import random_decoder
from sparse_bitnet.core import ConfigError
from sparse_bitnet.kernels import native
from sparse_bitnet.packed.load import load
from sparse_bitnet.serve.engine import BusyError, Engine, GenerationError, cache_bytes_per_token
from sparse_bitnet.serve.sampling import SamplingOptions

PROMPTS = [[5, 6, 7 + number] for number in range(12)]


@pytest.fixture(scope="module")
def model(pristine):
    model, _ = load(pristine / "two-bit")
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def engine(model):
    engine = Engine(model)
    yield engine
    engine.close()


async def tokens(engine, prompts, **options):
    made = engine.submit(prompts, [SamplingOptions(max_tokens=20, **options) for _ in prompts])

    async def all_of(one):
        ids = [token.id async for some in one for token in some]
        engine.cancel(one)
        return ids

    return await asyncio.gather(*map(all_of, made))


def test_every_token_arrives(engine, model):
    batch = asyncio.run(tokens(engine, PROMPTS))
    assert all(len(ids) == 20 for ids in batch)
    for prompt, ids in zip(PROMPTS, batch, strict=True):
        (alone,) = asyncio.run(tokens(engine, [prompt]))
        made = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
        assert alone == ids == made[0, len(prompt) :].tolist()


@pytest.mark.parametrize("count", [1, len(PROMPTS)])
def test_an_answer_that_does_not_stream_comes_once(engine, count):
    async def run():
        options = [SamplingOptions(max_tokens=20)] * count
        for one in engine.submit(PROMPTS[:count], options, streams=False):
            ((*made,),) = [some async for some in one]
            assert [token.id for token in made] == one.ids and len(made) == 20
            assert len(one.times) == 21 and one.times == sorted(one.times)
            engine.cancel(one)

    asyncio.run(run())


def test_a_failure_comes_after_the_tokens_before_it(engine):
    async def run():
        (one,) = engine.submit(PROMPTS[:1], [SamplingOptions(max_tokens=200)], streams=False)
        while len(one.ids) < 3:
            await asyncio.sleep(0.001)
        one.fail("so")
        found = []
        with pytest.raises(GenerationError, match="so"):
            async for some in one:
                found += some
        assert [token.id for token in found[:3]] == one.ids[:3]
        engine.cancel(one)

    asyncio.run(run())


def test_a_full_engine_starts_none_of_a_request(model):
    engine = Engine(model, most_running=2, most_waiting=1)

    async def fill():
        with pytest.raises(BusyError):
            engine.submit(PROMPTS[:4], [SamplingOptions(max_tokens=1)] * 4)
        assert not engine.generations
        return await tokens(engine, PROMPTS[:3])

    try:
        assert [len(ids) for ids in asyncio.run(fill())] == [20, 20, 20]
    finally:
        engine.close()


def test_sizes(model):
    config = model.config
    expected = 2 * config.num_hidden_layers * config.num_key_value_heads * 8 * 4
    assert cache_bytes_per_token(model) == expected
    with pytest.raises(ConfigError, match="128 is the smallest"):
        Engine(model, cache_tokens=5)
    with pytest.raises(ConfigError, match="--max-running"):
        Engine(model, most_running=0)


def test_an_answer_that_ends_before_its_last_token_leaves_the_batch(engine, monkeypatch):
    """A stop string or a complete grammar ends it, of which the batch knows nothing."""
    gone = []
    real = engine._manager.cancel_request
    monkeypatch.setattr(engine._manager, "cancel_request", lambda n: (gone.append(n), real(n)))

    async def run():
        one, other = engine.submit(PROMPTS[:2], [SamplingOptions(max_tokens=200)] * 2)
        one.finish_reason = "stop"
        engine.cancel(one)
        assert gone == [one.name]
        engine.cancel(other)

    asyncio.run(run())


@pytest.mark.skipif(native.path() == native.REFERENCE, reason="needs the compiled library")
def test_one_answer_alone_takes_the_native_call(monkeypatch):
    model = random_decoder("tiny", "6:8", vocabulary=300, device="cpu", dtype=torch.float32)
    model.generation_config.eos_token_id = None
    engine, served = Engine(model), []
    real = type(model.native).__call__

    def call(self, *args, **options):
        found = real(self, *args, **options)
        served.append(found is not None)
        return found

    monkeypatch.setattr(type(model.native), "__call__", call)
    asyncio.run(tokens(engine, PROMPTS[:1]))
    engine.close()
    assert served == [False] + 19 * [True]  # the prompt, and a token at a time
