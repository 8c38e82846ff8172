"""Packed modules: equal to training bit by bit, through moves, casts and copies."""

import copy
import itertools

import pytest
import torch
from torch import nn

from sparse_bitnet.core import ConfigError, Method, PackedFormatError, Pattern, WeightError
from sparse_bitnet.formats import STORAGES, two_bit
from sparse_bitnet.kernels import ternary_matmul
from sparse_bitnet.kernels.matmul import cpu
from sparse_bitnet.nn import SparseBitExperts, SparseBitLinear, SparseLinear
from sparse_bitnet.nn.pack import pack_module, swap_packed
from sparse_bitnet.nn.packed_linear import PackedLinear
from sparse_bitnet.nn.packed_module import PackedSpec, find_violation, prepare
from tiny_models import Experts

P68 = Pattern(6, 8)


@pytest.fixture(params=sorted(STORAGES))
def storage(request):
    return request.param


def trained_linear(in_features=40, out_features=6, bias=True, pattern=P68, **kwargs):
    linear = nn.Linear(in_features, out_features, bias=bias)
    return SparseBitLinear(linear, pattern, **kwargs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4])
def test_outputs_equal_training_bit_by_bit(storage, bias, dtype, bits):
    trained = trained_linear(bias=bias, method=Method(activation_bits=bits)).to(dtype)
    packed = pack_module(trained, storage, "l").to(dtype)
    for shape in [(5, 40), (2, 3, 40), (40,), (0, 40)]:
        x = torch.randn(shape, dtype=dtype)
        assert torch.equal(packed(x), trained(x))
        assert packed(x).dtype == dtype


@pytest.mark.parametrize("in_features", [1, 3, 5, 37])
def test_odd_input_features(storage, in_features):
    trained = trained_linear(in_features, 7, pattern=Pattern(1, 1))
    packed = pack_module(trained, storage, "l")
    x = torch.randn(4, in_features)
    assert torch.equal(packed(x), trained(x))


def test_autocast_like_training(storage):
    trained = trained_linear()
    packed = pack_module(trained, storage, "l")
    x = torch.randn(4, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = packed(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, trained(x))


def test_fused_segments_keep_their_scales(storage):
    trained = trained_linear(16, 12, shard_sizes=(6, 2, 4))
    packed = pack_module(trained, storage, "qkv")
    assert packed.weight_scale.shape == (3,)
    x = torch.randn(4, 16)
    assert torch.equal(packed(x), trained(x))


def test_experts_equal_training(storage):
    trained = SparseBitExperts(Experts(3, 16, 24), P68)
    packed = pack_module(trained, storage, "experts")
    assert packed.gate_up_proj_scale.shape == (3, 2) and packed.down_proj_scale.shape == (3, 1)
    hidden = torch.randn(9, 16)
    index = torch.randint(0, 4, (9, 2))  # 3 means no expert
    weights = torch.rand(9, 2)
    assert torch.equal(packed(hidden, index, weights), trained(hidden, index, weights))


def test_state_dict_is_the_storage_alone(storage):
    packed = pack_module(trained_linear(), storage, "l")
    prepare(packed)
    state = packed.state_dict()
    assert {name: tensor.dtype for name, tensor in state.items()} == {
        "weight": torch.uint8,
        "weight_scale": torch.float32,
        "bias": torch.float32,
    }
    assert state["weight"].shape == (6, STORAGES[storage].packed_length(40))
    assert not list(packed.parameters())


def test_loading_a_state_dict_replaces_what_was_derived(storage):
    one, two = (pack_module(trained_linear(), storage, "l") for _ in range(2))
    x = torch.randn(3, 40)
    assert not torch.equal(one(x), two(x))
    one.load_state_dict(two.state_dict())
    assert torch.equal(one(x), two(x))


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.type(torch.float16),
        lambda m: m.to("cpu"),
        copy.deepcopy,
    ],
)
def test_casts_leave_bytes_and_scales_alone(storage, move):
    packed = pack_module(trained_linear(), storage, "l")
    before = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    packed(torch.randn(1, 40))
    moved = move(packed)
    for name in ("weight", "weight_scale"):
        assert moved.state_dict()[name].dtype == before[name].dtype
        assert torch.equal(moved.state_dict()[name], before[name])
    assert not moved._prepared or moved is not packed


def test_meta_construction_and_to_empty(storage):
    spec = PackedSpec(storage, P68)
    with torch.device("meta"):
        packed = PackedLinear(40, 6, spec=spec, dtype=torch.bfloat16)
    assert all(buffer.is_meta for buffer in packed.buffers())
    packed.to(torch.float16)
    assert packed.weight_scale.dtype == torch.float32 and packed.bias.dtype == torch.float16
    packed.to_empty(device="cpu")
    assert packed.weight.dtype == torch.uint8 and not packed.weight.is_meta


def test_layout_is_derived_at_first_use_only(storage):
    packed = pack_module(trained_linear(), storage, "l")
    assert not packed._prepared
    packed(torch.randn(1, 40))
    first = packed.prepared("weight")
    packed(torch.randn(1, 40))
    assert packed.prepared("weight") is first


@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24)])
def test_find_violation_agrees_with_a_loop(shape):
    torch.manual_seed(0)
    for _ in range(30):
        ternary = torch.randint(-1, 2, shape, dtype=torch.int8)
        expected = None
        for row in itertools.product(*[range(n) for n in shape[:-1]]):
            for start in range(0, 24, 8):
                count = int((ternary[row][start : start + 8] != 0).sum())
                if count > 6 and expected is None:
                    at = row[0] if len(row) == 1 else row
                    expected = f"row {at} has {count} non-zeros in the group from input {start} on"
        assert find_violation(ternary, P68) == expected


def test_packing_refuses_the_full_precision_twin_and_unloaded_weights(storage):
    baseline = SparseLinear(nn.Linear(8, 4), P68)
    with pytest.raises(ConfigError, match="SparseLinear keeps full-precision weights"):
        pack_module(baseline, storage, "l")
    with torch.device("meta"):
        unloaded = trained_linear()
    with pytest.raises(ConfigError, match=r"l.weight: the weight is sharded or not loaded"):
        pack_module(unloaded, storage, "l")


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_check_refuses_scales(storage, value):
    packed = pack_module(trained_linear(), storage, "v_proj")
    packed.weight_scale.fill_(value)
    with pytest.raises(PackedFormatError, match=r"v_proj.weight_scale: a scale is not a positive"):
        packed.check()


def test_swap_refuses_unknown_modules():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    with pytest.raises(ConfigError, match="7: the model has no such module"):
        swap_packed(model, {"7": PackedSpec()})
    with pytest.raises(ConfigError, match="1: these experts cannot be packed, because its param"):
        swap_packed(model, {"1": PackedSpec()})
    swap_packed(model, {"0": PackedSpec()})
    assert isinstance(model[0], PackedLinear) and model[0].weight.is_meta


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
@pytest.mark.parametrize("bits", [8, 4])
def test_compiles_in_one_graph(storage, bits):
    packed = pack_module(trained_linear(method=Method(activation_bits=bits)), storage, "l")
    packed.prepare()
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (5, 40, 1):
        x = torch.randn(tokens, 40)
        assert torch.equal(compiled(x), packed(x))


def test_activations_that_became_integers_are_refused(storage):
    linear = trained_linear()
    for layer in (linear, pack_module(linear, storage, "layer")):
        with pytest.raises(ConfigError, match=r"got activations of torch\.uint8; .* a rule that"):
            layer(torch.ones(2, 40, dtype=torch.uint8))


@pytest.mark.parametrize("columns", [2**23, 2**25])
def test_rows_that_int32_cannot_sum_are_refused(columns):
    message = f"{columns} input features cannot be summed in 32 bits"
    with torch.device("meta"):
        linear = nn.Linear(columns, 1, bias=False)
        with pytest.raises(WeightError, match=f"weight: {message}"):
            SparseBitLinear(linear, Pattern(6, 8))
        with pytest.raises(WeightError, match=f"here.weight: {message}"):
            PackedLinear(columns, 1, False, spec=PackedSpec(), where="here")
    if columns == 2**23:
        x_q, ones = torch.ones(1, columns, dtype=torch.int8), torch.ones(1, 1)
        with pytest.raises(WeightError, match=message):
            ternary_matmul(x_q, ones, x_q, ones[0])
        with pytest.raises(WeightError, match=message):
            cpu.linear(x_q, *cpu.pack(x_q), ones[0], x_scale=ones)
        shorter = x_q[:, 1:]  # whose sum is rounded to float32 once
        y = ternary_matmul(127 * shorter, ones, shorter, ones[0])
        assert y.item() == torch.tensor(127 * (2**23 - 1)).float().item()


@pytest.mark.parametrize("storage", ["two-bit", "trits"])
def test_one_copy_of_a_weight_stays(storage):
    """Bytes as stored go once the compute layout is there, and come back when asked for."""
    torch.manual_seed(0)
    trained = SparseBitLinear(nn.Linear(64, 24), Pattern(6, 8))
    packed = pack_module(trained, storage, "linear")
    stored = packed.state_dict()["weight"].clone()
    x = torch.randn(3, 64)
    expected = packed(x)
    kept = packed.prepared("weight").packed
    held = packed._buffers["weight"]
    assert held is None or held.untyped_storage().data_ptr() == kept.untyped_storage().data_ptr()
    for again in (packed, copy.deepcopy(packed)):
        assert torch.equal(again.state_dict()["weight"], stored)
        assert torch.equal(again.unpack("weight"), packed.unpack("weight"))
        assert torch.equal(again.to(torch.float64).to(torch.float32)(x), expected)
        again(x)  # the layout is there anew
        again.load_state_dict({**again.state_dict(), "weight": stored})
        assert torch.equal(again(x), expected)


def test_a_weight_derived_in_two_bits_is_packed(monkeypatch):
    """As a GPU derives it."""
    trained = trained_linear()
    ternary, scale, _ = trained.derived()
    monkeypatch.setattr(trained, "derived", lambda name: (two_bit.pack(ternary), scale, None))
    assert torch.equal(pack_module(trained, "two-bit", "l").unpack("weight"), ternary)
