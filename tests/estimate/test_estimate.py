"""Estimates against what is really written, kept and computed."""

import json
import math

import pytest
import torch

from sparse_bitnet.core import CheckpointError, ConfigError, PatternError
from sparse_bitnet.estimate.devices import GPUS, Device, device_named
from sparse_bitnet.estimate.estimate import KEPT, estimate
from sparse_bitnet.kernels import native
from sparse_bitnet.nn import convert
from sparse_bitnet.nn.packed_module import prepare
from sparse_bitnet.packed.load import load_packed
from sparse_bitnet.packed.write import pack
from tiny_models import tiny

KINDS = {
    "qwen2": {"tie_word_embeddings": True},
    "qwen2-untied": {"tie_word_embeddings": False},
    "llama": {},
    "mixtral": {},
    "qwen2-moe": {},
}


def trained(kind, pattern="6:8", **sizes):
    name = kind.removesuffix("-untied").replace("-", "_")
    model = tiny(name, **KINDS[kind] | sizes)
    convert(model, pattern)
    return model.eval()


HEADS = pytest.mark.parametrize("head", ["float", "int8"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("storage", ["two-bit", "trits"])
@HEADS
def test_sizes_are_those_of_the_packed_model(tmp_path, kind, storage, head):
    """To the byte: the same code lays out the file. Without weights, from config.json alone."""
    model = trained(kind)
    result = pack(model, tmp_path / "packed", storage=storage, head=head, dtype="bfloat16")
    model.config.save_pretrained(tmp_path / "config")
    found = estimate(str(tmp_path / "config"), storage=storage, head=head)
    written = (tmp_path / "packed" / "model.safetensors").stat().st_size
    assert found.files.packed == written
    assert found.weights == result.weights and found.modules == result.modules
    assert found.stored_bits == pytest.approx(result.bits_per_weight)
    assert found.weights + found.other_parameters == sum(p.numel() for p in model.parameters())
    again = estimate(str(tmp_path / "packed"), storage=storage, head=head)
    assert again == found


@pytest.mark.parametrize("storage", ["two-bit", "trits"])
@pytest.mark.parametrize(
    ("kind", "pattern"),
    [("llama", "6:8"), ("llama", "2:4"), ("mixtral", "2:4")],
    ids=["6:8", "2:4", "experts"],
)
def test_memory_on_a_cpu_is_what_the_loaded_model_takes(
    tmp_path, monkeypatch, kind, pattern, storage
):
    cpu = Device("some CPU", 1.0, 1.0, 1.0, 0.0, "made up, for no rate counts here")
    monkeypatch.setattr("sparse_bitnet.estimate.estimate.device_named", lambda _: cpu)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    model = trained(kind, pattern, **sizes)
    pack(model, tmp_path / "packed", storage=storage, dtype="bfloat16")
    for path in native.available():
        with native.forced(path):
            model = load_packed(tmp_path / "packed", dtype="auto")
            prepare(model)
            tensors = [*model.parameters(), *model.buffers()]
            for module in model.modules():
                for layout in getattr(module, "_prepared", {}).values():
                    for weight in layout if isinstance(layout, list) else [layout]:
                        tensors += [weight.packed, weight.w_scale]
            taken = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
            found = estimate(str(tmp_path / "packed"), pattern=pattern, storage=storage, gpu="cpu")
            expected = pytest.approx(found.on_device.packed, rel=0.03)  # row scales count here
            assert sum(taken.values()) == expected, path


def test_the_kv_cache_is_what_transformers_keeps(tmp_path):
    model = trained("qwen2").to(torch.bfloat16)
    cache = model(torch.zeros(3, 10, dtype=torch.int64), use_cache=True).past_key_values
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    model.config.save_pretrained(tmp_path)
    assert kept == estimate(str(tmp_path), batch=3, context=10).kv_bytes


def kept_by_autograd(kind, hidden, intermediate, kv_heads, layers, tokens):
    """Bytes that autograd keeps of a training step's body, parameters and buffers apart."""
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    heads = {"num_attention_heads": hidden // 16, "num_key_value_heads": kv_heads}
    model = tiny("qwen2", max_position_embeddings=tokens, **sizes, **heads).train()
    convert(model, "6:8", kind=kind)
    own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = (storage.nbytes(), tensor)  # kept alive, so that ids differ
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        model.model(torch.zeros(1, tokens, dtype=torch.int64))
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("kind", ["bitnet", "bf16"])
def test_activations_are_what_autograd_keeps(kind):
    for hidden, intermediate, kv_heads in ((64, 128, 4), (96, 560, 1)):
        a, b, c, d = KEPT[kind]
        expected = a * hidden + b * intermediate + c * 16 * kv_heads + d

        def per_layer(tokens, shape=(hidden, intermediate, kv_heads)):
            two, one = (kept_by_autograd(kind, *shape, layers, tokens) for layers in (2, 1))
            return two - one

        assert (per_layer(96) - per_layer(32)) / 64 == pytest.approx(expected, rel=0.02)


def test_rooflines_by_hand(tmp_path):
    """qwen2.5-1.5b on an H200, one sequence: figures anyone can check."""
    found = estimate("qwen2.5-1.5b", prompt=1024, context=1, price=3.6)
    weights, head = 1_310_195_712, 151936 * 1536
    assert found.weights == weights and found.other_parameters == 1_543_714_304 - weights
    assert found.kv_bytes == 28 * 2 * 2 * 256
    attention = 28 * 4 * 1536 * 1024 * 1025 / 2
    bf16 = (2 * weights * 1024 + attention) / 989.4e12 + 2 * head / 4.8e12
    assert found.prefill.bf16.seconds == pytest.approx(bf16, rel=0.01)
    int8 = 2 * weights * 1024 / 1978.9e12 + attention / 989.4e12 + 2 * head / 4.8e12
    assert found.prefill.packed.seconds == pytest.approx(int8, rel=0.01)
    assert found.decode.bf16.seconds == pytest.approx(2 * (weights + head) / 4.8e12, rel=0.01)
    assert found.decode.packed.seconds == pytest.approx((weights / 4 + 2 * head) / 4.8e12, rel=0.01)
    assert (found.prefill.bf16.bound, found.decode.packed.bound) == ("arithmetic", "memory")
    price = f"{found.decode.bf16.seconds * 1e3:.4f}"  # 3.6 an hour is a thousandth a second
    assert f"  decode{price:>36}" in str(found)
    assert found.training.bf16 == 16 * (weights + found.other_parameters)
    # Backward reads the ternary weights, two bits each.
    assert found.training.packed - found.training.bf16 == weights // 4
    int8 = estimate("qwen2.5-1.5b", head="int8", prompt=1024, context=1)
    assert found.decode.packed.seconds - int8.decode.packed.seconds == pytest.approx(head / 4.8e12)


def test_a_gpu_keeps_two_bits_whatever_the_pattern():
    found = [estimate("qwen2.5-0.5b", pattern=p, prompt=8192) for p in ("dense", "6:8", "2:4")]
    one, *others = [(f.on_device.packed, f.prefill.packed.seconds) for f in found]
    assert all(other == one for other in others)
    assert found[0].prefill.packed.seconds < found[0].prefill.bf16.seconds
    trits = estimate("qwen2.5-0.5b", prompt=8192, storage="trits")
    assert trits.on_device.packed == found[0].on_device.packed
    assert trits.files.packed < found[0].files.packed


@pytest.mark.parametrize("gpu", [*GPUS, "cpu"])
def test_the_page(gpu):
    page = str(estimate("tiny", vocab_size=1000, gpu=gpu, price=2.0, prompt=64, context=64))
    for line in ("becomes ternary", "KV cache", "training state", "prefill", "decode", "× "):
        assert line in page
    assert "a million tokens cost at least" in page and "· times are rooflines" in page
    device = device_named(gpu) if gpu != "cpu" else None
    assert (device.source if device else "measured now") in page


def test_rates_of_a_slow_cpu_are_not_rounded_to_nothing(monkeypatch):
    slow = Device("slow CPU", 0.0123, 0.00456, 5.0, 0.0, "made up")
    monkeypatch.setattr("sparse_bitnet.estimate.estimate.device_named", lambda _: slow)
    assert "0.012 TFLOPS bf16, 0.0046 TOPS int8" in str(estimate("qwen2.5-0.5b", gpu="cpu"))
    measured = device_named("cpu")
    assert min(measured.bf16, measured.int8, measured.bandwidth) > 0 and not measured.is_gpu


def test_what_does_not_fit_is_reported(tmp_path):
    page = str(estimate("qwen2.5-3b", gpu="l4", batch=64, context=32768))
    assert "BF16 does not fit: the device has 24.00 GB" in page
    trained("mixtral").config.save_pretrained(tmp_path)
    assert "different experts" in str(estimate(str(tmp_path)))


def test_experts_are_read_as_tokens_meet_them(tmp_path):
    trained("mixtral").config.save_pretrained(tmp_path)  # 2 of 4 experts a token
    one, many = (estimate(str(tmp_path), batch=batch, context=1) for batch in (1, 64))
    assert one.operations_per_token == many.operations_per_token
    assert one.decode.bf16.seconds < many.decode.bf16.seconds


def test_layers_of_linear_attention_have_no_kv_cache(tmp_path):
    config = trained("qwen2").config
    config.save_pretrained(tmp_path)
    both = estimate(str(tmp_path))
    told = json.loads((tmp_path / "config.json").read_text())
    told["layer_types"] = ["linear_attention", "full_attention"]
    (tmp_path / "config.json").write_text(json.dumps(told))
    assert 2 * estimate(str(tmp_path)).kv_bytes == both.kv_bytes > 0


def test_a_configuration_alone_and_a_run(trained, tmp_path):
    trained("qwen2").config.save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "run" / "model" / "config.json").rename(tmp_path / "bare.json")
    assert estimate(str(tmp_path / "bare.json")).weights == 15_360
    (tmp_path / "bare.json").rename(tmp_path / "run" / "model" / "config.json")
    with pytest.raises(CheckpointError, match=r"run is a training run; give its model, .*/model$"):
        estimate(str(tmp_path / "run"))


def test_models_without_attention_are_refused(tmp_path):
    from transformers import Mamba2Config

    Mamba2Config(num_hidden_layers=1, hidden_size=64, num_heads=4, head_dim=32).save_pretrained(
        tmp_path
    )
    with pytest.raises(ConfigError, match="a Mamba2ForCausalLM is no decoder of attention"):
        estimate(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": "gpt-9"}, ConfigError, "model 'gpt-9' is no preset"),
        ({"model": "tiny"}, ConfigError, "takes its vocabulary from the data: give --vocab-size"),
        ({"gpu": "abacus"}, ConfigError, "gpu 'abacus' is unknown; choose among a100, h100"),
        ({"pattern": "9:8"}, PatternError, "9:8"),
        ({"pattern": "4:7"}, PatternError, "7"),
        ({"batch": 0}, ConfigError, "estimate: --batch is 0; it has to be 1 or more"),
        ({"price": -1.0}, ConfigError, "estimate: --price is -1.0; it has to be 0 or more"),
        ({"price": math.nan}, ConfigError, "estimate: --price is nan"),
        ({"storage": "zip"}, ConfigError, "storage is 'zip'"),
    ],
)
def test_refused(options, error, message):
    with pytest.raises(error, match=message):
        estimate(**{"model": "qwen2.5-0.5b"} | options)


@pytest.mark.parametrize(
    "config", [{}, {"model_type": "wonder"}, {"model_type": "qwen2", "hidden_size": "wide"}, []]
)
def test_configs_that_describe_no_model(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="transformers cannot build a model of this config"):
        estimate(str(tmp_path))


def test_training_over_gpus_is_the_arithmetic_of_fsdp():
    """By hand: 7B on 64 H200s. tests/nn/test_fsdp.py counts the bytes of small models."""
    found = estimate("qwen2.5-7b", gpus=64, step=2**22)
    one = found.sharding
    weights, others = found.weights, found.other_parameters
    assert one["shards"] == pytest.approx(16 * (weights + others) / 64)
    assert one["gathered"] == pytest.approx(63 / 64 * (0.5 * weights + 4 * others))
    assert one["reduced"] == pytest.approx(63 / 64 * 4 * (weights + others))
    assert one["network_seconds"] == pytest.approx((one["gathered"] + one["reduced"]) / 50e9)
    assert one["compute_seconds"] == pytest.approx(
        6 * (weights + others) * 2**22 / 64 / (0.4 * 989.4e12)
    )
    assert "training on 64 GPUs" in str(found)
    inside = estimate("qwen2.5-7b", gpus=8).sharding
    assert inside["network_seconds"] < one["network_seconds"]
    assert estimate("qwen2.5-7b").sharding is None
    with pytest.raises(ConfigError, match="gpus is 0"):
        estimate("qwen2.5-7b", gpus=0)
