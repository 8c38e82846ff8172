"""A forward computes with the weights as they are then, whoever wrote them and how."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_bitnet.core import (
    ConfigError,
    WeightError,
    method_mask,
    quantize_activations,
    ternarize,
)
from sparse_bitnet.nn import (
    SparseBitExperts,
    SparseBitLinear,
    convert,
    frozen,
    master_weights,
    set_pattern,
)

pytestmark = [
    pytest.mark.usefixtures("threads", "fresh_compiler"),
    pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning"),
]
KINDS = ["bitnet", "bf16"]


def two_layers(kind="bitnet"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))
    convert(model, "6:8", kind=kind)
    return model


def expected(model, x):
    """What the definition gives for the weights as they are now; reads parameters alone."""
    first, _, last = model.children()
    return one_layer(last, torch.tanh(one_layer(first, x)))


def one_layer(layer, x):
    weight, bias = layer.weight.detach().clone(), layer.bias.detach()
    if isinstance(layer, SparseBitLinear):
        ternary, scale = ternarize(weight, layer.pattern)
        x_q, x_scale = quantize_activations(x)
        return (x_q.double() @ ternary.double().t() * x_scale * scale + bias).to(x.dtype)
    mask = method_mask(weight, layer.pattern, layer.method)
    return F.linear(x, weight if mask is None else weight * mask, bias)


def assert_new(model, run, before):
    """The forward has the new weights, and not the old ones."""
    x = inputs().to(next(model.parameters()).dtype)
    with torch.no_grad():
        after = run(x)
        torch.testing.assert_close(after, expected(model, x), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(after.float(), before.float(), atol=1e-3)


def inputs():
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


def backward(model):
    model(inputs()).square().sum().backward()


def stepped(optimizer_of, compiled=False):
    def edit(model):
        optimizer = optimizer_of(model.parameters())
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for _ in range(2):
            backward(model)
            step()

    return edit


def step_through_data(model):
    """As engines do it that keep master weights of their own and copy slices of them back."""
    backward(model)
    flat = torch.cat([p.detach().flatten() - p.grad.flatten() for p in model.parameters()])
    for parameter in model.parameters():
        part, flat = flat[: parameter.numel()], flat[parameter.numel() :]
        parameter.data.copy_(part.view_as(parameter))


def replace_data(model):
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter)


def no_grad(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))


def inference_mode(model):
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.neg_()


def through_numpy(model):
    """PyTorch cannot see this one at all."""
    for parameter in model.parameters():
        parameter.detach().numpy()[:] *= -1.5


def load(assign):
    def edit(model):
        values = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
        model.load_state_dict(values, assign=assign)

    return edit


def load_submodule(model):
    model[0].load_state_dict({"weight": torch.randn(16, 16), "bias": torch.randn(16)})


def replace_parameter(model):
    model[0].weight = nn.Parameter(torch.randn(16, 16))


def swap_average(model):
    """An exponential moving average goes in by ``copy_``, as diffusion and timm trainers do it."""
    average = [p.detach().clone() * 0.5 + torch.randn_like(p) for p in model.parameters()]
    torch._foreach_copy_([p.data for p in model.parameters()], average)


def another_pattern(model):
    set_pattern(model, "2:4")


EDITS = {
    "sgd": stepped(lambda p: torch.optim.SGD(p, lr=0.5)),
    "adamw": stepped(lambda p: torch.optim.AdamW(p, lr=0.3, foreach=False)),
    "foreach": stepped(lambda p: torch.optim.AdamW(p, lr=0.3, foreach=True)),
    "fused": stepped(lambda p: torch.optim.AdamW(p, lr=0.3, fused=True)),
    "compiled step": stepped(lambda p: torch.optim.SGD(p, lr=0.5), compiled=True),
    "engine": step_through_data,
    "data replaced": replace_data,
    "no_grad": no_grad,
    "inference mode": inference_mode,
    "numpy": through_numpy,
    "load": load(assign=False),
    "load by assignment": load(assign=True),
    "load a submodule": load_submodule,
    "parameter replaced": replace_parameter,
    "average": swap_average,
    "pattern": another_pattern,
    "double": lambda model: (no_grad(model), model.double())[0],
}


@pytest.mark.parametrize(
    ("kind", "how"),
    [*((kind, how) for kind in KINDS for how in ("eager", "compiled")), ("bitnet", "inductor")],
)
def test_every_edit_is_seen(kind, how):
    """All edits one after another, so that each comes after forwards of the same compiled code."""
    model = two_layers(kind)
    run = model
    if how != "eager":
        run = torch.compile(
            model, backend="inductor" if how == "inductor" else "aot_eager", fullgraph=True
        )
    for name, edit in EDITS.items():
        with torch.no_grad():
            before = run(inputs())
        edit(model)
        try:
            assert_new(model, run, before)
        except AssertionError as error:
            raise AssertionError(name) from error
        model.float()
        set_pattern(model, "6:8")


@pytest.mark.parametrize("kind", KINDS)
def test_an_average_of_models(kind):
    model = two_layers(kind)
    average = torch.optim.swa_utils.AveragedModel(model)
    before = average(inputs()).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(3):
        backward(model)
        optimizer.step()
        average.update_parameters(model)
    assert_new(average.module, average, before)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_go_their_own_way(kind, how):
    model = two_layers(kind)
    before = model(inputs()).detach()
    with frozen(model):
        twin = how(model)
    stepped(lambda p: torch.optim.SGD(p, lr=1.0))(twin)
    assert_new(twin, twin, before)
    assert torch.equal(model(inputs()), before)


def test_a_closure_that_changes_weights_inside_a_step():
    model = two_layers()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        y = model(inputs())
        torch.testing.assert_close(y.detach(), expected(model, inputs()), rtol=1e-5, atol=1e-6)
        loss = y.square().sum()
        loss.backward()
        return loss.item()

    optimizer.step(closure)


@pytest.mark.parametrize("compiled", [False, True])
def test_merged_adapters(tiny, tokens, compiled):
    """``merge_and_unload`` writes through ``.data``; what it leaves computes with the sum."""
    peft = pytest.importorskip("peft")
    model, plain = tiny(num_hidden_layers=1), tiny(num_hidden_layers=1)
    convert(model)
    options = {"r": 4, "lora_alpha": 64, "target_modules": ["q_proj", "down_proj"]}
    adapted = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **options))
    logits = torch.compile(adapted, backend="aot_eager") if compiled else adapted
    with torch.no_grad():
        logits(input_ids=tokens, use_cache=False)
        adapted.merge_adapter()
        merged_in_place = logits(input_ids=tokens, use_cache=False).logits
        merged = adapted.merge_and_unload()
        found = merged(input_ids=tokens, use_cache=False).logits
        plain.load_state_dict(merged.state_dict())
        convert(plain)
        correct = plain(input_ids=tokens, use_cache=False).logits
    assert torch.equal(found, correct)
    torch.testing.assert_close(merged_in_place, correct)


@pytest.mark.parametrize("kind", KINDS)
class TestDevicesAndTypes:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_to_another_dtype(self, kind, dtype):
        model = two_layers(kind).to(dtype)
        x = inputs().to(dtype)
        assert model(x).dtype == dtype
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(model(x), expected(model, x), rtol=tolerance, atol=tolerance)

    def test_nothing_is_kept_but_parameters(self, kind):
        """So nothing has to be moved, saved, broadcast or refreshed."""
        model = two_layers(kind)
        model(inputs())
        assert not list(model.buffers())
        assert set(model.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}

    @pytest.mark.parametrize("assign", [False, True])
    def test_meta_to_real(self, kind, assign):
        source = two_layers(kind)
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))
            convert(model, kind=kind)
        if not assign:
            model.to_empty(device="cpu")
        model.load_state_dict(source.state_dict(), assign=assign)
        assert torch.equal(model(inputs()), source(inputs()))

    def test_meta_forward_knows_shapes(self, kind):
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(16, 8))
            convert(model, kind=kind)
            assert model(torch.empty(3, 16)).shape == (3, 8)

    def test_weights_that_arrive_rounded_are_refused(self, kind):
        """As FSDP2 gathers them for a forward: masks and γ would not be the master weight's."""
        model = two_layers(kind)
        model[0]._parameters["weight"] = nn.Parameter(model[0].weight.bfloat16())
        with pytest.raises(ConfigError, match=r"was torch.float32 and is torch.bfloat16.*autocast"):
            model(inputs())


@pytest.mark.parametrize("compiled", [False, True])
class TestFrozen:
    def test_derives_once(self, monkeypatch, compiled):
        model = two_layers()
        run = torch.compile(model, backend="aot_eager") if compiled else model
        before = run(inputs())
        count = []
        derive = SparseBitLinear.derive
        monkeypatch.setattr(
            SparseBitLinear, "derive", lambda self, name: count.append(1) or derive(self, name)
        )
        with torch.inference_mode(), frozen(model):
            for _ in range(3):
                assert torch.equal(run(inputs()), before)
            assert len(count) == 2
        run(inputs()).sum().backward()  # nothing of inference mode is left

    @pytest.mark.parametrize("edit", ["sgd", "engine", "numpy", "pattern", "data replaced"])
    def test_an_edit_inside_is_an_error(self, edit, compiled):
        model = two_layers()
        run = torch.compile(model, backend="aot_eager") if compiled else model
        before = run(inputs()).detach()
        message = r"0.weight changed while the model was frozen"
        with pytest.raises(WeightError, match=message), frozen(model):
            EDITS[edit](model)
        assert_new(model, run, before)

    def test_another_error_goes_through(self, compiled):
        model = two_layers()
        before = model(inputs()).detach()
        with pytest.raises(ZeroDivisionError), frozen(model):
            no_grad(model)
            raise ZeroDivisionError
        assert_new(model, model, before)


def test_micro_batches_of_a_step_may_share_what_they_derive():
    apart, together = two_layers(), two_layers()
    for _ in range(2):
        backward(apart)
    with frozen(together):
        for _ in range(2):
            backward(together)
    for a, b in zip(apart.parameters(), together.parameters(), strict=True):
        assert a.grad is not None and torch.equal(a.grad, b.grad)


def test_master_weights_and_masks(tiny):
    model = tiny("mixtral")
    convert(model, "2:4", rules={"q_proj": "dense"})
    weights = {weight.name: weight for weight in master_weights(model)}
    parameters = dict(model.named_parameters())
    assert all(parameters[name] is weight.weight for name, weight in weights.items())
    experts = weights["model.layers.0.mlp.experts.gate_up_proj"]
    assert experts.shard_sizes == (48, 48)
    assert experts.mask.shape == (4, 96, 32)
    assert weights["model.layers.0.self_attn.q_proj.weight"].mask is None
    assert isinstance(experts.module, SparseBitExperts)
