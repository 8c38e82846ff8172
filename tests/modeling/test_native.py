"""One token of each sequence through all layers in one native call, against the modules."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers.cache_utils import DynamicCache, StaticCache

from sparse_bitnet.kernels import native
from sparse_bitnet.kernels.int8_linear.reference import int8_linear
from sparse_bitnet.kernels.native.layer import StepCall
from sparse_bitnet.modeling import KeyValueCache, build_decoder, cache
from sparse_bitnet.modeling.layers import Head
from sparse_bitnet.modeling.native import NativeStep
from sparse_bitnet.nn.int8_head import Int8Head, TiedInt8Head, quantize_rows

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
GREEDY = {"max_new_tokens": 30, "do_sample": False}
pytestmark = pytest.mark.skipif(not native.available(), reason="the CPU kernel was not compiled")


def step(model, tokens, past):
    with torch.inference_mode():
        logits = model(tokens, past_key_values=past).logits
    return logits


def errors(plain, model, texts):
    """Of prompts, and of four tokens after each, relative to the largest logit."""
    of_prompts = []
    of_steps = []
    for _ in range(texts):
        pasts = DynamicCache(config=plain.config), KeyValueCache(model.config)
        for index in range(5):
            tokens = torch.randint(0, 300, (1, 1 if index else 11))
            expected, y = (
                step(m, tokens, p).float() for m, p in zip((plain, model), pasts, strict=True)
            )
            error = float((y - expected).abs().max() / expected.abs().max())
            (of_steps if index else of_prompts).append(error)
            for name in ("keys", "values"):
                one, other = (getattr(past.layers[1], name) for past in pasts)
                assert one.shape == other.shape
    return of_prompts, of_steps


def median(values):
    return sorted(values)[len(values) // 2]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("pattern", ["6:8", "2:4"])
def test_a_step_equals_the_modules(packed, architecture, pattern):
    """In float32 all that differs is the order of sums, unless it turns a rounding over."""
    plain = packed(architecture, pattern=pattern)
    model = build_decoder(copy.deepcopy(plain))
    of_prompts, of_steps = errors(plain, model, 15)
    assert model.native.call is not None
    assert max(of_prompts) == 0  # they go the modules' way
    assert median(of_steps) < 1e-5
    assert max(of_steps) < 0.03


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_a_step_in_half_precision(packed, architecture, dtype):
    plain = packed(architecture, dtype)
    model = build_decoder(copy.deepcopy(plain))
    assert max(errors(plain, model, 4)[1]) < 0.05
    assert model.native.call is not None


@pytest.mark.parametrize("path", native.available())
def test_every_path(packed, path):
    with native.forced(path):
        plain = packed("qwen3", pattern="2:4")
        model = build_decoder(copy.deepcopy(plain))
        assert median(errors(plain, model, 4)[1]) < 1e-5
        assert model.native.call is not None


@pytest.mark.parametrize("path", native.available())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["tied", "own", "with a bias"])
def test_an_int8_head_is_exact(packed, path, dtype, kind):
    """A head that is the identity shows what the head is given: int8 heads equal theirs of it."""
    weight, scale = quantize_rows(torch.randn(301, 96))
    with native.forced(path):
        model = build_decoder(packed("qwen2", dtype))
        model.lm_head = Head(nn.Linear(96, 96, bias=False, dtype=dtype))
        model.lm_head.weight = nn.Parameter(torch.eye(96, dtype=dtype), False)
        model.native = NativeStep(model.model)
        hidden = after_a_prompt(model)
        table = Int8Head(301, 96, kind == "with a bias", dtype=dtype)
        table.weight, table.weight_scale = weight, scale
        if kind == "with a bias":
            table.bias = torch.randn(301).to(dtype)
        model.lm_head = TiedInt8Head(table) if kind == "tied" else table
        model.native = NativeStep(model.model)
        found = after_a_prompt(model)
        assert model.native.call is not None
    assert torch.equal(found, model.lm_head(hidden))
    if dtype == torch.float32:
        plain = int8_linear(hidden, weight, scale, table.bias)
        assert torch.equal(found, plain)


def test_many_threads_on_few_cores(packed):
    """More threads than cores wait for each other asleep, and none is lost."""
    model = build_decoder(packed(hidden_size=768, intermediate_size=2048))
    before, threads = after_a_prompt(model), torch.get_num_threads()
    try:
        torch.set_num_threads(9)
        for _ in range(30):
            assert torch.equal(after_a_prompt(model), before)
    finally:
        torch.set_num_threads(threads)


def test_a_head_of_another_kind_goes_the_modules_way(packed):
    model = build_decoder(packed())
    before = after_a_prompt(model)
    model.lm_head = nn.Sequential(model.lm_head)
    model.native = NativeStep(model.model)
    assert torch.allclose(after_a_prompt(model), before, rtol=0, atol=1e-4)
    assert model.native.call is None


def test_rotation_that_depends_on_the_length(packed):
    """Rows of a table serve only where a position's angles depend on nothing else."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    plain = packed("llama", rope_parameters=rope, max_position_embeddings=8)
    model = build_decoder(copy.deepcopy(plain))
    assert median(errors(plain, model, 4)[1]) < 1e-5
    assert model.native.call is not None


def test_several_whose_rotations_depend_on_each_other(packed):
    """Padded rows of one step have other lengths, and dynamic RoPE asks for the longest."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    plain = packed("llama", rope_parameters=rope, max_position_embeddings=8)
    model = build_decoder(copy.deepcopy(plain))
    tokens, mask = torch.randint(1, 300, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    mask[1, :5] = mask[2, :2] = 0
    options = GREEDY | {"attention_mask": mask, "pad_token_id": 0, "max_new_tokens": 6}
    with torch.inference_mode():
        assert torch.equal(plain.generate(tokens, **options), model.generate(tokens, **options))
    assert model.native.call is None


@pytest.mark.parametrize("batch", [1, 3])
def test_embeddings_that_are_a_view(packed, batch):
    """The library reads rows one after the other; a slice of a longer text has gaps."""
    plain = packed("llama")
    model = build_decoder(copy.deepcopy(plain))
    text, found = torch.randint(0, 300, (batch, 4)), []
    with torch.inference_mode():
        for one in (plain, model):
            past = (
                DynamicCache(config=plain.config) if one is plain else KeyValueCache(model.config)
            )
            x = one.get_input_embeddings()(text)
            one(inputs_embeds=x[:, :3], past_key_values=past)
            found.append(one(inputs_embeds=x[:, 3:], past_key_values=past).logits)
    assert model.native.call is not None
    assert torch.allclose(*found, rtol=0, atol=1e-4)


def test_modules_may_be_replaced(packed):
    model = build_decoder(packed("llama"))
    before = after_a_prompt(model)
    model.model.norm = copy.deepcopy(model.model.norm)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    assert torch.allclose(after_a_prompt(model), 2 * before, rtol=1e-4, atol=1e-4)
    model.lm_head = Head(nn.Linear(96, 310, bias=False))
    assert after_a_prompt(model).shape[-1] == 310
    past = KeyValueCache(model.config)
    model.model.layers[1] = model.model.layers[0]
    step(model, torch.ones(1, 3, dtype=torch.long), past)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NativeStep, "__call__", lambda *_: None)
        other = copy.deepcopy(past)
        expected = step(model, torch.ones(1, 1, dtype=torch.long), other)
    assert torch.allclose(
        step(model, torch.ones(1, 1, dtype=torch.long), past), expected, atol=1e-4
    )


def test_positions_beyond_a_table(packed):
    plain = packed("llama")
    model = build_decoder(copy.deepcopy(plain))
    options = GREEDY | {"max_new_tokens": 150}
    prompt = torch.randint(0, 300, (1, 4))
    assert torch.equal(model.generate(prompt, **options), plain.generate(prompt, **options))


def test_biases_of_every_product(packed):
    plain = packed("llama", attention_bias=True, mlp_bias=True)
    model = build_decoder(copy.deepcopy(plain))
    assert median(errors(plain, model, 4)[1]) < 1e-5
    assert model.native.call is not None


def test_generates_beyond_the_room_of_a_cache(packed, monkeypatch):
    monkeypatch.setattr(cache, "SPARE_TOKENS", 3)
    plain = packed()
    model = build_decoder(copy.deepcopy(plain))
    prompt = torch.randint(0, 300, (1, 4))
    assert torch.equal(model.generate(prompt, **GREEDY), plain.generate(prompt, **GREEDY))
    assert model.native.call is not None


def test_a_cache_that_was_cropped_or_rebuilt(packed):
    plain = packed("llama")
    model = build_decoder(copy.deepcopy(plain))
    pasts = DynamicCache(config=plain.config), KeyValueCache(model.config)
    for index, length in enumerate((9, 1, 1, 6, 1, 1, 1)):
        for past in pasts:
            if index == 3:
                past.crop(-3)
            if index == 5:
                past.batch_select_indices(torch.tensor([0]))
            if index == 6:
                past.reset()
        tokens = torch.randint(0, 300, (1, length))
        expected, y = (step(m, tokens, p) for m, p in zip((plain, model), pasts, strict=True))
        assert torch.allclose(y, expected, atol=0.02 * float(expected.abs().max()))


def test_two_threads_with_a_cache_each(packed):
    model = build_decoder(packed())
    prompts = [torch.arange(3 + i).view(1, -1) for i in range(4)]
    expected = [model.generate(prompt, **GREEDY) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda prompt: model.generate(prompt, **GREEDY), prompts))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("case", ["padding", "static", "dynamic", "no cache", "autocast"])
def test_leaves_what_it_does_not_serve_to_the_modules(packed, case):
    plain = packed()
    model = build_decoder(copy.deepcopy(plain))
    ids = torch.arange(12).view(2, 6)
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 2:4] = case != "padding"  # in the middle
    results = []
    for one in (plain, model):
        past = DynamicCache(config=plain.config)
        if one is model and case != "dynamic":
            past = KeyValueCache(plain.config)
        if case == "static":
            past = StaticCache(config=plain.config, max_cache_len=16)
        with (
            torch.no_grad(),
            torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"),
        ):
            if case != "no cache":
                one(ids, attention_mask=mask[:, :6], past_key_values=past)
            else:
                past, mask = None, mask[:, :1]
            found = one(ids[:, :1], attention_mask=mask, past_key_values=past, use_cache=False)
            results.append(found.logits)
    # The library multiplies with the head of few tokens, in another order of sums.
    assert torch.allclose(*results, rtol=0, atol=1e-6 * 96)
    assert model.native.call is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", native.available())
@pytest.mark.parametrize("padding", [(0,), (0, 0, 0), (4, 0, 1), tuple(range(7)), (3, 1) * 9])
def test_a_batch_gives_each_sequence_what_it_gets_alone(packed, path, dtype, padding):
    """Bit for bit: sums of one sequence are taken in the same order however many there are."""
    with native.forced(path):
        model = build_decoder(packed("qwen3", dtype))
        texts = torch.randint(1, 300, (len(padding), 9))
        mask = (torch.arange(11) >= torch.tensor(padding)[:, None]).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        past = KeyValueCache(model.config)
        for at in (slice(0, 8), slice(8, 9)):  # a prompt, and a token in one call
            found = model(
                texts[:, at],
                attention_mask=mask[:, : at.stop],
                position_ids=positions[:, at],
                past_key_values=past,
            ).logits[:, -1]
        assert model.native.call is not None
        for row, pad in enumerate(padding):
            alone = KeyValueCache(model.config)
            for layer, whole in zip(alone.layers, past.layers, strict=True):
                layer.update(
                    whole.keys[row : row + 1, :, pad:-1], whole.values[row : row + 1, :, pad:-1]
                )
            assert torch.equal(step(model, texts[row : row + 1, 8:], alone)[0, -1], found[row])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generates_batches_with_padding(packed, architecture):
    plain = packed(architecture)
    model = build_decoder(copy.deepcopy(plain))
    prompts, mask = torch.randint(1, 300, (5, 6)), torch.ones(5, 6, dtype=torch.int64)
    mask[1, :4] = mask[3, :1] = 0
    options = GREEDY | {"attention_mask": mask, "pad_token_id": 0}
    assert torch.equal(model.generate(prompts, **options), plain.generate(prompts, **options))
    assert model.native.call is not None


def test_a_batch_whose_sequences_are_reordered_and_dropped(packed):
    plain = packed("llama")
    model = build_decoder(copy.deepcopy(plain))
    pasts = DynamicCache(config=plain.config), KeyValueCache(model.config)
    kept = torch.tensor([2, 0, 2])
    tokens = torch.randint(0, 300, (3, 5))
    for _ in range(4):
        expected, y = (step(m, tokens, p) for m, p in zip((plain, model), pasts, strict=True))
        assert torch.allclose(y, expected, atol=0.02 * float(expected.abs().max()))
        for past in pasts:
            past.reorder_cache(kept)
        tokens = torch.randint(0, 300, (3, 1))
    assert model.native.call is not None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_continuous_batching_goes_through_one_call(packed, continuously, architecture, monkeypatch):
    """Sequences of other lengths, which end one after the other; one prompt is read in pieces."""
    rows = []
    served = StepCall.__call__

    def counted(call, x, *args):
        rows.append(len(x))
        return served(call, x, *args)

    monkeypatch.setattr(StepCall, "__call__", counted)
    model = build_decoder(packed(architecture))
    prompts = [torch.randint(1, 300, (length,)).tolist() for length in (3, 50, 1, 17, 9)]
    lengths = [12, 20, 5, 31, 1]
    found = continuously(model, prompts, lengths)
    assert max(rows) >= 3 and min(rows) == 1
    for prompt, length, answer in zip(prompts, lengths, found, strict=True):
        ids = torch.tensor([prompt])
        alone = model.generate(ids, max_new_tokens=length, do_sample=False, eos_token_id=-1)
        assert answer == alone[0, len(prompt) :].tolist()


def test_continuous_batching_with_sliding_windows_goes_the_modules_way(packed, continuously):
    model = build_decoder(packed("mistral", sliding_window=9))
    prompts = [[5, 6, 7], list(range(1, 20))]
    found = continuously(model, prompts, [12, 12])
    assert model.native.call is None
    for prompt, answer in zip(prompts, found, strict=True):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        assert answer == alone[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {"num_attention_heads": 4, "head_dim": 24}),
        ("llama", {"hidden_act": "gelu"}),
        ("mistral", {"sliding_window": 9}),
        ("qwen2", {"bits": 4}),
        ("qwen2", {"pattern": None}),
    ],
)
def test_layers_that_it_does_not_compute(packed, architecture, changes):
    plain = packed(architecture, **changes)
    model = build_decoder(copy.deepcopy(plain))
    prompt = torch.randint(0, 300, (1, 4))
    assert torch.equal(model.generate(prompt, **GREEDY), plain.generate(prompt, **GREEDY))
    assert model.native.call is None


def after_a_prompt(model):
    """Logits of a token after five others."""
    past = KeyValueCache(model.config)
    step(model, torch.arange(5).view(1, 5), past)
    return step(model, torch.arange(1).view(1, 1), past)


def test_sees_weights_that_change_and_threads(packed):
    model = build_decoder(packed())
    before, threads = after_a_prompt(model), torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert torch.allclose(after_a_prompt(model), before, atol=0.01)
    finally:
        torch.set_num_threads(threads)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.mul_(3)
    halved = after_a_prompt(model)
    assert not torch.equal(halved, before)
    model.to(torch.bfloat16).to(torch.float32)
    assert torch.allclose(after_a_prompt(model), halved, atol=0.05 * float(halved.abs().max()))


def test_sees_memory_that_was_replaced(packed):
    """``parameter.data = …`` keeps the object and frees the memory that the call points to."""
    model = build_decoder(packed())
    before = after_a_prompt(model)
    for layer in model.model.layers:
        layer.input_layernorm.weight.data = layer.input_layernorm.weight.data.flip(0) * 3
        bias = layer.self_attn.qkv_proj.bias
        bias.data = bias.data.flip(0) + 1
    found = after_a_prompt(model)
    assert not torch.allclose(found, before, atol=0.1)
    model.native = NativeStep(model.model)  # prepares its call anew
    assert torch.equal(found, after_a_prompt(model))


def test_a_copy_has_its_own_call(packed):
    model = build_decoder(packed())
    before = after_a_prompt(model)
    other = copy.deepcopy(model)
    assert other.native.call is None
    for layer in other.model.layers:
        layer.input_layernorm.weight.mul_(3)
    assert not torch.equal(after_a_prompt(other), before)
    assert torch.equal(after_a_prompt(model), before)
