"""convert on the architectures of transformers 5, its rules, and every refusal."""

import itertools

import pytest
import torch
from torch import nn

from sparse_bitnet.core import ConfigError, Method, Pattern, PatternError, WeightError, worst_group
from sparse_bitnet.nn import (
    SparseBitExperts,
    SparseBitLinear,
    SparseExperts,
    SparseLinear,
    convert,
    converted_modules,
    master_weights,
    set_pattern,
)
from sparse_bitnet.packed.load import load_packed
from sparse_bitnet.packed.write import pack

# (modules, weights) converted: attention 4 and MLP 3 a layer of two; experts count as one module.
ATTENTION = 2 * (2 * 32 * 32 + 2 * 32 * 16)
COUNTS = {
    "qwen2": (14, ATTENTION + 2 * 3 * 32 * 48),
    "llama": (14, ATTENTION + 2 * 3 * 32 * 48),
    "mistral": (14, ATTENTION + 2 * 3 * 32 * 48),
    "qwen2_moe": (16, ATTENTION + 2 * 3 * 32 * (4 * 16 + 24)),
    "mixtral": (10, ATTENTION + 2 * 3 * 32 * 4 * 48),
    "gpt_oss": (8, ATTENTION),
}


@pytest.mark.parametrize("architecture", ["phi3", "glm", "glm4"])
def test_fused_matrices_keep_a_scale_each(tiny, architecture):
    """q, k and v, gate and up: fused in one linear or not, the same γ for the same weights."""
    model = tiny(architecture, head_dim=8)
    parts = {"mlp.gate_up_proj": (48, 48)}
    if architecture == "phi3":
        parts["self_attn.qkv_proj"] = (32, 16, 16)
    with torch.no_grad():  # as different as can be seen
        for name, rows in parts.items():
            for index, part in enumerate(
                model.get_submodule(f"model.layers.0.{name}").weight.split(list(rows))
            ):
                part.normal_(std=0.01 * 4**index)
    convert(model, "6:8")
    for name, module in converted_modules(model):
        rows = parts.get(name.removeprefix("model.layers.").partition(".")[2], ())
        assert module.shard_sizes == rows, name
        for index, part in enumerate(module.weight.split(list(rows)) if rows else []):
            alone = SparseBitLinear(nn.Linear(32, len(part), bias=False), Pattern(6, 8))
            with torch.no_grad():
                alone.weight.copy_(part)
            assert torch.equal(alone.derived()[1][0], module.derived()[1][index])
            assert torch.equal(alone.derived()[0], module.derived()[0].split(list(rows))[index])


def test_a_twin_knows_its_fused_matrices(tiny):
    """Statistics and a mask from quantized weights take γ of each, as in the ternary model."""
    model, baseline = tiny("phi3", head_dim=8), tiny("phi3", head_dim=8)
    method = Method(mask_source="quantized")
    with torch.no_grad():
        for each in (model, baseline):
            for _, parameter in sorted(each.named_parameters()):
                if parameter.ndim == 2:
                    parameter.copy_(
                        torch.linspace(-1, 1, parameter.numel()).pow(5).view_as(parameter)
                    )
    convert(model, "6:8", method=method)
    convert(baseline, "6:8", kind="bf16", method=method)
    masters = zip(master_weights(model), master_weights(baseline), strict=True)
    for ours, theirs in masters:
        assert ours.shard_sizes == theirs.shard_sizes, ours.name
        assert torch.equal(theirs.module.derived()[0], ours.mask), ours.name
    assert any(one.shard_sizes for one in master_weights(baseline))


class Own(nn.Linear):
    """A subclass, which may compute something else."""


def perceptron(*sizes):
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))


@pytest.mark.parametrize("architecture", COUNTS)
class TestArchitectures:
    def test_trains(self, tiny, tokens, architecture):
        model = tiny(architecture)
        keys = list(model.state_dict())
        report = convert(model, "6:8")
        assert (report.modules, report.weights) == COUNTS[architecture]
        assert list(model.state_dict()) == keys
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model.train()
        losses = []
        for _ in range(3):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[2] < losses[1] < losses[0]
        for _, module in converted_modules(model):
            for buffer in module.buffers():
                assert buffer.dtype != torch.int8 or worst_group(buffer, 8) <= 6

    def test_dense_twin_is_the_model_itself(self, tiny, logits, tokens, architecture):
        model = tiny(architecture)
        expected = logits(model, tokens)
        convert(model, "dense", kind="bf16")
        torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-5, atol=1e-6)


class TestReport:
    def test_says_what_it_did(self, tiny):
        report = convert(tiny(), "6:8")
        assert str(report) == (
            "14 modules with 15,360 weights converted to bitnet 6:8, 1 left as they were"
        )
        assert report.skipped == {"lm_head": "the output head stays in full precision"}
        assert str(convert(tiny(), "dense", kind="bf16")).endswith(
            "converted to bf16 dense, 1 left as they were"
        )
        assert str(convert(perceptron(8, 8))) == (
            "1 modules with 64 weights converted to bitnet 6:8"
        )

    def test_experts_of_other_shapes_are_left_with_a_reason(self, tiny):
        model = tiny("gpt_oss")
        report = convert(model)
        reason = report.skipped["model.layers.1.mlp.experts"]
        assert "not gate_up_proj and down_proj alone" in reason
        assert isinstance(model.model.layers[0].self_attn.q_proj, SparseBitLinear)

    def test_routers_stay(self, tiny):
        report = convert(tiny("qwen2_moe"))
        gates = [name for name, why in report.skipped.items() if "routers" in why]
        assert gates == [f"model.layers.{i}.mlp.shared_expert_gate" for i in (0, 1)]

    @pytest.mark.parametrize("name", ["router", "gate", "indexer"])
    def test_routers_wrapped_once_more_stay(self, name):
        class Wrapped(nn.Module):
            def __init__(self):
                super().__init__()
                self.add_module(name, perceptron(8, 4))
                self.gate_proj = nn.Linear(8, 8)

        report = convert(Wrapped())
        assert report.modules == 1
        assert report.skipped == {f"{name}.0": "routers and indexers stay in full precision"}

    def test_subclasses_of_linear_stay(self):
        report = convert(nn.Sequential(nn.Linear(8, 8), Own(8, 8), nn.Conv1d(8, 8, 3)))
        assert report.skipped["1"] == "it is a Own, not a plain nn.Linear"
        assert report.skipped["2"] == "convolutions stay in full precision"


class TestSharing:
    def test_parameters_are_shared_not_copied(self, tiny):
        model = tiny()
        before = dict(model.named_parameters())
        convert(model)
        after = dict(model.named_parameters())
        assert list(before) == list(after)
        assert all(before[name] is after[name] for name in before)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("kind", ["bitnet", "bf16"])
    @pytest.mark.parametrize("architecture", ["qwen2", "qwen2_moe"])
    def test_models_of_other_dtypes_train_in_float32(self, tiny, tokens, dtype, kind, architecture):
        model = tiny(architecture).to(dtype)
        convert(model, kind=kind)
        assert model.get_input_embeddings().weight.dtype == dtype
        output = model(input_ids=tokens, labels=tokens)
        assert output.logits.dtype == dtype
        output.loss.backward()
        for _, module in converted_modules(model):
            for parameter in module.parameters():
                assert parameter.grad is not None and parameter.grad.dtype == torch.float32

    @pytest.mark.parametrize("tied", [True, False])
    def test_tied_head_stays_tied(self, tiny, tied):
        model = tiny(tie_word_embeddings=tied)
        convert(model)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        assert type(head) is nn.Linear
        assert (head.weight is embedding.weight) == tied

    def test_a_head_tied_by_hand_is_found(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.embedding = nn.Embedding(8, 8)
                self.inner = nn.Linear(8, 8)
                self.head = nn.Linear(8, 8, bias=False)
                self.head.weight = self.embedding.weight

        model = Model()
        assert convert(model).skipped == {"head": "the output head stays in full precision"}
        assert type(model.head) is nn.Linear

    def test_one_module_in_two_places_stays_one(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.first = nn.Linear(8, 8)
                self.again = self.first

        model = Model()
        report = convert(model)
        assert (report.modules, report.weights) == (1, 64)
        assert isinstance(model.first, SparseBitLinear)
        assert model.again is model.first

    def test_training_mode_and_frozen_weights_are_kept(self):
        model = perceptron(8, 8, 8).eval()
        model[0].weight.requires_grad_(False)
        convert(model)
        assert not model[0].training
        assert not model[0].weight.requires_grad
        assert model[1].weight.requires_grad


class TestRules:
    def test_first_rule_that_is_found_decides(self, tiny):
        model = tiny()
        rules = {r"layers\.0\.mlp": "skip", r"q_proj|down_proj": "2:4", "v_proj": "dense"}
        report = convert(model, "6:8", rules=rules)
        assert {n: w for n, w in report.skipped.items() if n != "lm_head"} == {
            f"model.layers.0.mlp.{name}_proj": "a rule skips it" for name in ("gate", "up", "down")
        }
        patterns = {name: str(module.pattern) for name, module in converted_modules(model)}
        assert patterns["model.layers.0.self_attn.q_proj"] == "2:4"
        assert patterns["model.layers.1.mlp.down_proj"] == "2:4"
        assert patterns["model.layers.1.self_attn.v_proj"] == "dense"
        assert patterns["model.layers.1.self_attn.k_proj"] == "6:8"
        assert type(model.model.layers[0].mlp.down_proj) is nn.Linear

    def test_own_patterns_outlive_a_schedule(self, tiny):
        """Dense first: a rule's pattern returns as soon as the schedule is sparse, whatever N:M."""
        model = tiny()
        convert(model, "6:8", rules={"q_proj": "2:4", "v_proj": "dense"})
        attention = model.model.layers[0].self_attn
        for scheduled, q, k in [("dense", "dense", "dense"), ("7:8", "2:4", "7:8"), ("4:8",) * 3]:
            set_pattern(model, scheduled)
            assert str(attention.k_proj.pattern) == k
            assert str(attention.q_proj.pattern) == (q if scheduled != "4:8" else "2:4")
            assert attention.v_proj.pattern.is_dense

    @pytest.mark.parametrize(
        ("rules", "message"),
        [
            ({"(": "6:8"}, r"rule '\(' is not a regular expression"),
            ({"q_proj": "6/8"}, r"rule 'q_proj': pattern '6/8' is not understood.*or write 'skip'"),
            ({"q_proj": 248}, r"rule 'q_proj': pattern 248 is not text"),
            ({"q_prj": "skip"}, r"rule 'q_prj' matches no linear module; there are model\.layers"),
            ({"lm_head": "6:8"}, r"rule 'lm_head' decides for no module.*stays in full precision"),
            (
                {"proj": "4:8", "q_proj": "skip"},
                r"rule 'q_proj' decides for no module.*an earlier rule decides",
            ),
        ],
    )
    def test_refuses_what_has_no_effect_or_no_meaning(self, tiny, rules, message):
        model = tiny()
        with pytest.raises(ConfigError, match=message):
            convert(model, rules=rules)
        assert not list(converted_modules(model))


class TestRefusals:
    def test_a_row_that_m_does_not_divide(self, tiny):
        model = tiny(intermediate_size=44)
        with pytest.raises(PatternError) as error:
            convert(model, "6:8")
        assert str(error.value) == (
            "model.layers.0.mlp.down_proj.weight (32, 44): in_features 44 is not a multiple of "
            "M = 8 of pattern 6:8; use a group size among [2, 4], or a rule that gives this module "
            "another pattern or skips it"
        )
        assert not list(converted_modules(model))  # nothing was swapped before the refusal

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_damaged_weights(self, tiny, bad):
        model = tiny()
        model.model.layers[1].mlp.up_proj.weight.data[3, 4] = bad
        with pytest.raises(
            WeightError,
            match=r"model\.layers\.1\.mlp\.up_proj\.weight \(48, 32\): 1 of 1536 values",
        ):
            convert(model)
        assert not list(converted_modules(model))

    def test_weights_that_float32_cannot_hold(self):
        model = perceptron(8, 8).double()
        model[0].weight.data.fill_(1e300)
        with pytest.raises(WeightError, match="64 of 64 values are NaN or infinite"):
            convert(model)

    def test_twice(self, tiny):
        model = tiny()
        convert(model)
        with pytest.raises(ConfigError, match="converted already; use set_pattern"):
            convert(model, "4:8")

    def test_a_packed_model(self, tiny, tmp_path):
        model = tiny()
        convert(model, rules={"k_proj": "skip"})
        pack(model, tmp_path / "packed")
        with pytest.raises(
            ConfigError, match="packed model has no master weights; take the trained"
        ):
            convert(load_packed(tmp_path / "packed"))  # not k_proj alone

    @pytest.mark.parametrize(
        ("model", "options", "message"),
        [
            (nn.Sequential(nn.ReLU()), {}, r"no nn\.Linear or expert weights .*\(0 were left"),
            (nn.Sequential(Own(8, 8)), {}, r"\(1 were left out: 0\); .* it is a Own, not"),
            (nn.Linear(8, 8), {}, r"is itself a Linear.*put it into a module first"),
            (perceptron(8, 8), {"rules": {".": "skip"}}, r"\(1 were left out: 0\)"),
            (perceptron(8, 8), {"kind": "fp8"}, r"kind is 'fp8'; choose among \['bf16', 'bitn"),
            (perceptron(8, 8), {"pattern": "six of eight"}, "write N:M as in 6:8, or dense"),
        ],
    )
    def test_nothing_or_nonsense(self, model, options, message):
        with pytest.raises((ConfigError, PatternError), match=message):
            convert(model, **options)

    def test_set_pattern_changes_all_or_nothing(self):
        model = perceptron(8, 4, 8)
        convert(model, "2:4")
        with pytest.raises(PatternError, match=r"^1\.weight \(8, 4\): in_features 4 is not"):
            set_pattern(model, "6:8")
        assert {str(m.pattern) for _, m in converted_modules(model)} == {"2:4"}


@pytest.mark.parametrize(
    ("kind", "linear", "experts"),
    [("bitnet", SparseBitLinear, SparseBitExperts), ("bf16", SparseLinear, SparseExperts)],
)
def test_kinds_and_methods_reach_every_module(tiny, kind, linear, experts):
    model = tiny("mixtral")
    method = Method(gradient="masked", activation_bits=4)
    convert(model, "2:4", kind=kind, method=method)
    modules = [module for _, module in converted_modules(model)]
    assert {type(module) for module in modules} == {linear, experts}
    assert all(m.method == method and m.pattern == Pattern(2, 4) for m in modules)


@pytest.mark.parametrize("architecture", ["qwen2", "mixtral"])
def test_parameters_that_an_engine_partitioned_are_refused(tiny, architecture):
    """As ZeRO-3 leaves them: size 0 in the place of every weight, experts too."""
    model = tiny(architecture)
    name, parameter = next(p for p in model.named_parameters() if "mlp" in p[0])
    parameter.data = torch.empty(0)
    with pytest.raises(ConfigError) as caught:
        convert(model)
    assert f"{name} (0,) holds no values" in str(caught.value)
    assert "Gather the model first (deepspeed.zero.GatheredParameters)" in str(caught.value)
    assert not any(converted_modules(model))


def test_a_model_partitioned_after_convert_says_so(tiny):
    model = tiny("qwen2")
    convert(model)
    master = next(iter(master_weights(model)))
    master.weight.data = torch.empty(0)
    with pytest.raises(ConfigError, match=r"holds no values: an engine .* shard with FSDP2"):
        _ = master.mask


def test_offloaded_parameters_are_refused(tiny):
    model = tiny("qwen2")
    name = "model.layers.1.mlp.up_proj"
    linear = model.get_submodule(name)
    linear.weight = nn.Parameter(linear.weight.to("meta"))
    message = rf"{name}\.weight \(48, 32\) is on the meta device.*Load the model whole"
    with pytest.raises(ConfigError, match=message):
        convert(model)
    model.to("meta")
    model.hf_device_map = {"": "disk"}
    with pytest.raises(ConfigError, match="is on the meta device"):
        convert(model)
    del model.hf_device_map
    assert convert(model).modules == 14  # a shape without values


def test_matrices_that_are_all_zero_are_named(tiny, capsys):
    model = tiny("mixtral")
    assert convert(model).zero == []
    assert "zero" not in capsys.readouterr().err
    model = tiny("mixtral")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.zero_()
        model.model.layers[1].mlp.experts.down_proj[2].zero_()
        model.model.layers[1].mlp.experts.gate_up_proj[3, :48].zero_()  # its gate
    experts = "model.layers.1.mlp.experts"
    names = [f"{experts}.gate_up_proj[3, 0:48]", f"{experts}.down_proj[2]"]
    names.insert(0, "model.layers.0.self_attn.q_proj.weight")
    assert convert(model).zero == names
    assert f"warning: 3 matrices are all zero: {', '.join(names)}" in capsys.readouterr().err
