"""One token of each sequence as a recorded pass, against the modules.

Without a GPU a recording is played back as the Python that it was made of; what a CUDA graph would
hold of it (which memory it reads) is looked at while that runs.
"""

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparse_bitnet.modeling import KeyValueCache, build_decoder, graph
from sparse_bitnet.nn.packed_module import PackedModule

GREEDY = {"max_new_tokens": 40, "do_sample": False}


class Reads(TorchDispatchMode):
    """The memory that a function reads and did not make."""

    def __init__(self):
        super().__init__()
        self.made = set()
        self.read = {}
        self.alive = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for one in tree_leaves((args, kwargs)):
            if isinstance(one, Tensor) and memory(one) not in self.made:
                self.read[memory(one)] = one
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and memory(one) not in self.read:
                self.made.add(memory(one))
                self.alive.append(one)  # so that nothing else gets its place
        return result


def memory(tensor):
    return tensor.untyped_storage().data_ptr()


class Recorder:
    """Stands for CUDA's: counts recordings and replays, notes what a recording reads."""

    def __init__(self):
        self.recorded = self.replayed = 0
        self.reads = Reads()

    def __call__(self, step, device):
        self.recorded += 1
        self.reads = Reads()
        with self.reads:
            step()

        def replay(fill):
            self.replayed += 1
            fill()
            return step().clone()

        return replay


def of_model(model):
    """Parameters, buffers, and weights in the layout that they are multiplied in."""
    owned = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if isinstance(module, PackedModule):
            for weight in module._prepared.values():
                owned += [one for one in vars(weight).values() if isinstance(one, Tensor)]
    return owned


@pytest.fixture
def recorder(monkeypatch):
    one = Recorder()
    monkeypatch.setattr(graph, "DEVICE", "cpu")
    monkeypatch.setattr(graph, "record", one)
    monkeypatch.setattr("sparse_bitnet.modeling.native.NativeStep.__call__", lambda *_: None)
    return one


def decoder(packed, *args, **options):
    return build_decoder(packed(*args, **options))


@torch.no_grad()
def by_modules(model, *args, **options):
    """What the model gives if nothing is recorded."""
    plain = copy.copy(model)
    plain.__dict__ = model.__dict__ | {"graph": lambda *_: None}
    return plain.generate(*args, **options)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_the_same_text(packed, recorder, architecture):
    model = decoder(packed, architecture)
    ids = torch.randint(1, 300, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # padded at the left, and one hole in the middle
    mask[1, 5] = 0
    expected = by_modules(model, ids, attention_mask=mask, **GREEDY)
    assert recorder.replayed == 0
    found = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(found, expected)
    # The prompt gives the first token, the modules two, until the cache is met a third time.
    assert recorder.replayed == GREEDY["max_new_tokens"] - graph.MEETINGS
    assert recorder.recorded == 1


def test_logits_with_and_without_mask_and_positions(packed, recorder):
    model = decoder(packed)
    ids = torch.randint(1, 300, (2, 7))
    pasts = [KeyValueCache(model.config) for _ in range(2)]
    with torch.inference_mode():
        for past in pasts:
            model(ids, past_key_values=past)
        for index in range(9):
            token = torch.randint(1, 300, (2, 1))
            masked = {"attention_mask": torch.ones(2, 8 + index, dtype=torch.int64)}
            if index % 3 == 0:
                masked["attention_mask"][0, :3] = 0
            if index % 2:
                masked["position_ids"] = torch.tensor([[3 + index], [7 + index]])
            given = masked if index else {}
            y = model(token, past_key_values=pasts[0], **given).logits
            expected = model.model(token, past_key_values=pasts[1], **given).last_hidden_state
            torch.testing.assert_close(y, model.lm_head(expected), rtol=1e-5, atol=1e-5)
    assert recorder.replayed == 10 - graph.MEETINGS
    for one, other in zip(pasts[0].layers, pasts[1].layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, rtol=1e-5, atol=1e-5)


def test_a_longer_text_is_recorded_anew(packed, recorder, monkeypatch):
    monkeypatch.setattr("sparse_bitnet.modeling.cache.SPARE_TOKENS", 8)
    model = decoder(packed)
    ids = torch.randint(1, 300, (1, 5))
    expected = by_modules(model, ids, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert 2 <= recorder.recorded <= 5


def test_a_short_answer_records_nothing(packed, recorder):
    model = decoder(packed)
    ids = torch.randint(1, 300, (1, 5))
    model.generate(ids, max_new_tokens=graph.MEETINGS, do_sample=False)
    assert recorder.recorded == 0


@pytest.mark.parametrize("what", ["layer", "head"])
def test_hooks_are_called(packed, recorder, what):
    model = decoder(packed)
    module = model.lm_head if what == "head" else model.model.layers[1].mlp
    ids = torch.randint(1, 300, (1, 5))
    seen = []
    hook = module.register_forward_hook(lambda *_: seen.append(1))
    expected = model.generate(ids, **GREEDY)
    assert recorder.recorded == 0
    hook.remove()
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert recorder.recorded == 1
    assert len(seen) == (GREEDY["max_new_tokens"] if what == "head" else 1 + 39)


def test_a_recording_that_fails(packed, recorder, monkeypatch):
    """The text is that of the modules, with a warning once, until the model has moved."""
    model = decoder(packed)
    ids = torch.randint(1, 300, (1, 5))
    expected = by_modules(model, ids, **GREEDY)

    def no_memory(*_):
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr(graph, "record", no_memory)
    with pytest.warns(UserWarning, match="module by module from now on.*no memory is left"):
        assert torch.equal(model.generate(ids, **GREEDY), expected)
    monkeypatch.setattr(graph, "record", recorder)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert recorder.recorded == 0
    model.to(torch.float64).to(torch.float32)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert recorder.recorded == 1


def test_a_moved_model_keeps_nothing(packed, recorder):
    model = decoder(packed)
    model.generate(torch.randint(1, 300, (1, 5)), **GREEDY)
    old = weakref.ref(model.model.layers[0].mlp.down_proj.prepared("weight"))
    model.to(torch.bfloat16)
    recorder.reads = Reads()
    gc.collect()
    assert not model.graph._graphs
    assert old() is None


@pytest.mark.parametrize("what", ["mlp", "down_proj", "norm", "head", "last"])
def test_a_replaced_module_is_seen(packed, recorder, what):
    """Over the same cache, and where the new one has the old one's weights."""
    model = decoder(packed)
    past = KeyValueCache(model.config)
    token = torch.randint(1, 300, (1, 1))

    class Half(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args):
            return self.inner(*args) / 2

    with torch.no_grad():
        model(torch.randint(1, 300, (1, 7)), past_key_values=past)
        for _ in range(graph.MEETINGS + 1):
            before = model(token, past_key_values=past).logits
            past.crop(-1)
        layer = model.model.layers[1]
        if what == "mlp":
            layer.mlp = copy.deepcopy(layer.mlp)
            down = layer.mlp.down_proj
            down.store("weight", down.unpack("weight"), 2 * down.weight_scale)
        elif what == "down_proj":
            layer.mlp.down_proj = copy.deepcopy(model.model.layers[0].mlp.down_proj)
        elif what == "norm":
            layer.input_layernorm = copy.deepcopy(layer.input_layernorm)
            layer.input_layernorm.epsilon = 0.5
        elif what == "last":
            model.model.norm = copy.deepcopy(model.model.norm)
            model.model.norm.epsilon = 0.5
        else:
            model.lm_head = Half(model.lm_head)
        for _ in range(graph.MEETINGS + 1):
            found = model(token, past_key_values=past).logits
            past.crop(-1)
        model.graph = lambda *_: None
        expected = model(token, past_key_values=past).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, before, rtol=1e-3)


def recorded_once(model):
    """A cache of two sequences, and the pass that was recorded over it."""
    past = KeyValueCache(model.config)
    with torch.no_grad():
        model(torch.randint(1, 300, (2, 7)), past_key_values=past)
        for _ in range(graph.MEETINGS):
            model(torch.randint(1, 300, (2, 1)), past_key_values=past)
    (recorded,) = model.graph._graphs.values()
    return past, recorded


def test_all_that_is_read_is_owned(packed, recorder):
    """A CUDA graph holds addresses: whatever it reads must live as long as it does."""
    model = decoder(packed)
    past, recorded = recorded_once(model)
    owned = [*of_model(model), *vars(recorded.inputs).values()]
    owned += [one for layer in past.layers for one in (layer.keys, layer.values)]
    assert recorder.reads.read
    missing = set(recorder.reads.read) - {memory(one) for one in owned}
    assert not missing, [recorder.reads.read[one].shape for one in missing]


def test_a_cache_is_not_kept(packed, recorder):
    """By CUDA's recording; this one keeps what its Python reads."""
    model = decoder(packed)
    past, recorded = recorded_once(model)
    recorded._replay, recorder.reads = None, Reads()
    gone = weakref.ref(past.layers[0]._buffers[0])
    del past
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("what", ["norm", "bias", "weight", "head", "embedding"])
def test_a_replaced_weight_is_seen(packed, recorder, what):
    model, other = decoder(packed), decoder(packed)
    ids = torch.randint(1, 300, (1, 5))
    model.generate(ids, **GREEDY)
    for one in (model, other):
        torch.manual_seed(1)
        layer = one.model.layers[1]
        if what == "norm":
            layer.input_layernorm.weight = nn.Parameter(torch.rand(96), requires_grad=False)
        elif what == "bias":
            layer.self_attn.qkv_proj.bias = torch.randn_like(layer.self_attn.qkv_proj.bias)
        elif what == "weight":
            ternary = torch.randint(-1, 2, (96, 192), dtype=torch.int8)
            ternary[:, ::4] = 0  # 6:8
            layer.mlp.down_proj.store("weight", ternary, torch.rand(1))
        elif what == "head":
            one.lm_head.weight = nn.Parameter(torch.randn(300, 96), requires_grad=False)
        else:
            one.model.embed_tokens.weight = nn.Parameter(torch.randn(300, 96), requires_grad=False)
    expected = by_modules(other, ids, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY), expected)


def test_conversations_take_turns(packed, recorder):
    """Each has its own graph, used again when its turn comes; only so many are kept."""
    model = decoder(packed)
    count = graph.MOST_GRAPHS + 2
    texts = [torch.randint(1, 300, (1, 5 + one)) for one in range(count)]
    pasts = [KeyValueCache(model.config) for _ in range(count)]
    with torch.no_grad():
        for text, past in zip(texts, pasts, strict=True):
            model(text, past_key_values=past)
            for _ in range(graph.MEETINGS):
                model(text[:, -1:], past_key_values=past)
        assert recorder.recorded == count
        assert len(model.graph._graphs) == graph.MOST_GRAPHS
        for _ in range(3):
            for text, past in zip(texts[-2:], pasts[-2:], strict=True):
                model(text[:, -1:], past_key_values=past)
    assert recorder.recorded == count


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_continuous_batching(packed, recorder, continuously, architecture):
    """Sequences of other lengths, which end one after the other; one prompt is read in pieces."""
    model = decoder(packed, architecture)
    prompts = [torch.randint(1, 300, (length,)).tolist() for length in (3, 50, 1, 17, 9)]
    lengths = [12, 40, 5, 61, 1]
    expected = []
    for prompt, length in zip(prompts, lengths, strict=True):
        ids = torch.tensor([prompt])
        alone = by_modules(model, ids, do_sample=False, max_new_tokens=length, eos_token_id=None)
        expected.append(alone[0, len(prompt) :].tolist())
    assert continuously(model, prompts, lengths) == expected
    assert recorder.replayed > 40
    # Passes over four, two sequences and one; all have the same room for keys.
    assert recorder.recorded <= 4
    # All is owned by the model and the recording but the one tensor that has all pages.
    recorded = list(model.graph._graphs.values())[-1]
    owned = {memory(one) for one in [*vars(recorded.inputs).values(), *of_model(model)]}
    assert len(set(recorder.reads.read) - owned) == 1


def test_too_many_keys_go_module_by_module(packed, recorder, continuously, monkeypatch):
    model = decoder(packed)
    prompts = [[5, 6, 7], list(range(1, 20))]
    expected = continuously(model, prompts, [9, 9])
    assert recorder.replayed
    recorder.replayed = 0
    monkeypatch.setattr(graph, "MOST_GATHERED", 2 * 32 * graph.FEWEST_KEYS - 1)
    assert continuously(model, prompts, [9, 9]) == expected
    assert recorder.replayed == 0


def test_threads_take_turns(packed, recorder):
    model = decoder(packed)
    prompts = [torch.randint(1, 300, (1, 6)) for _ in range(4)]
    expected = [by_modules(model, ids, **GREEDY) for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda ids: model.generate(ids, **GREEDY), prompts))
    assert all(map(torch.equal, found, expected))


def test_beams(packed, recorder):
    """Their caches are copied about with every token."""
    model = decoder(packed)
    ids = torch.randint(1, 300, (1, 6))
    options = GREEDY | {"num_beams": 3, "max_new_tokens": 12}
    assert torch.equal(model.generate(ids, **options), by_modules(model, ids, **options))


def test_what_it_does_not_serve(packed, recorder):
    model = decoder(packed)
    ids = torch.randint(1, 300, (1, 6))
    expected = by_modules(model, ids, **GREEDY)
    for options in ({"cache_implementation": "static"}, {"use_cache": False}):
        assert torch.equal(model.generate(ids, **GREEDY, **options), expected)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model.generate(ids, **GREEDY)
    past = KeyValueCache(model.config)
    with torch.no_grad():
        model(ids, past_key_values=past)
        for _ in range(3):
            model(inputs_embeds=torch.randn(1, 1, 96), past_key_values=past)
            found = model(ids[:, :1], past_key_values=past, output_hidden_states=True)
            assert len(found.hidden_states) == 3
            model(ids[:, :3], past_key_values=past)
    windows = decoder(packed, "mistral", sliding_window=8)
    windows.generate(ids, **GREEDY)
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    decoder(packed, rope_parameters=dynamic).generate(ids, **GREEDY)
    decoder(packed, pattern=None).generate(ids, **GREEDY)
    assert recorder.recorded == recorder.replayed == 0


def test_copies_record_their_own(packed, recorder):
    model = decoder(packed)
    ids = torch.randint(1, 300, (1, 6))
    expected = model.generate(ids, **GREEDY)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not other.graph._graphs
        other.lm_head.weight.data.copy_(torch.randn(300, 96))
        changed = by_modules(other, ids, **GREEDY)
        assert not torch.equal(changed, expected)
        assert torch.equal(other.generate(ids, **GREEDY), changed)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
