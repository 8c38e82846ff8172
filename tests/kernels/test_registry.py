"""Backends of packed weights: one for each device, equal to the reference."""

import pytest
import torch

from sparse_bitnet.core import BackendError, ConfigError, quantize_int8
from sparse_bitnet.kernels import native, platform, registry
from sparse_bitnet.kernels.matmul import hopper, reference, triton_two_bit
from sparse_bitnet.kernels.matmul.reference import ternary_matmul
from sparse_bitnet.kernels.registry import (
    BACKENDS,
    backend_of,
    explain,
    integer_linear,
    prepare,
    ternary_linear,
)

HERE = [name for name in BACKENDS if BACKENDS[name].serves(torch.device("cpu"))]


def operands(out=24, columns=64, tokens=5):
    ternary = torch.randint(-1, 2, (out, columns), dtype=torch.int8)
    return torch.randn(tokens, columns), ternary, torch.rand(out), torch.randn(out)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_every_backend_of_this_device_is_the_reference(backend, tokens):
    x, ternary, w_scale, bias = operands(tokens=tokens)
    weight = prepare(ternary, w_scale, backend=backend)
    assert weight.backend == backend
    assert torch.equal(weight.unpack(), ternary)
    x_q, x_scale = quantize_int8(x) if tokens else (x.to(torch.int8), x[:, :1])
    residual = torch.randn(tokens, 24)
    for given in (None, bias):
        expected = ternary_matmul(x_q, x_scale, ternary, w_scale, given)
        assert torch.equal(ternary_linear(x, weight, given), expected)
        found = integer_linear(x_q, x_scale, weight, given, torch.float32)
        assert torch.equal(found, expected)
        found = integer_linear(x_q, x_scale, weight, given, torch.float32, residual)
        assert torch.equal(found, residual + expected)


def test_leading_dimensions_stay():
    x, ternary, w_scale, bias = operands(tokens=6)
    weight = prepare(ternary, w_scale)
    y = ternary_linear(x.view(2, 3, -1), weight, bias, torch.bfloat16)
    assert y.shape == (2, 3, 24) and y.dtype == torch.bfloat16
    assert torch.equal(y.view(6, 24), ternary_linear(x, weight, bias, torch.bfloat16))


def test_a_residual_of_another_shape_or_dtype_is_refused():
    x, ternary, w_scale, _ = operands(tokens=3)
    weight = prepare(ternary, w_scale)
    x_q, x_scale = quantize_int8(x.unsqueeze(0))
    for residual in (torch.zeros(1, 3, 1), torch.zeros(1, 1, 24), torch.zeros(1, 3, 24).half()):
        with pytest.raises(BackendError, match=r"residual: .* added to a result \(1, 3, 24\)"):
            integer_linear(x_q, x_scale, weight, None, torch.float32, residual)


def test_scales_of_rows_are_contiguous():
    """A kernel reads them before the one ahead has ended, which a copy just made would be."""
    ternary = torch.zeros(16, 64, dtype=torch.int8)
    assert prepare(ternary, torch.ones(1).expand(16)).w_scale.is_contiguous()


def test_each_gpu_has_its_backend(monkeypatch):
    device = torch.device("cuda", 0)

    def chosen(capability, nvrtc=True, triton=True):
        for module in (hopper, platform, reference):
            monkeypatch.setattr(module, "capability", lambda index: capability)
        monkeypatch.setattr(hopper, "has_nvrtc", lambda: nvrtc)
        for module in (platform, reference):
            monkeypatch.setattr(module, "has_triton", lambda: triton)
        return backend_of(device).name

    assert chosen((9, 0)) == "hopper"
    assert chosen((9, 0), nvrtc=False) == "triton"
    assert [chosen(c) for c in ((8, 0), (8, 9), (10, 0), (12, 0))] == ["triton"] * 4
    assert chosen((7, 5)) == "reference"
    assert BACKENDS["reference"].reason(device) == "compute capability 7.5 is below 8.0"
    assert chosen((9, 0), nvrtc=False, triton=False) == "reference"
    assert "Triton is not installed" in BACKENDS["reference"].reason(device)


def test_a_cpu_has_the_compiled_library():
    expected = "native" if native.available() else "reference"
    assert backend_of(torch.device("cpu")).name == expected
    with native.forced("reference"):
        assert backend_of(torch.device("cpu")).name == "reference"
    assert backend_of(torch.device("meta")).name == "reference"


def test_explains_what_serves_a_device():
    backend = backend_of(torch.device("cpu"))
    said = f"cpu: packed weights are multiplied by {backend.name} ({native.explanation()})"
    assert explain("cpu") == said
    with pytest.raises(ConfigError, match="device 'cudaa' cannot be used here"):
        explain("cudaa")


def test_a_new_backend_is_one_class(monkeypatch):
    class Better(reference.Reference):
        name, rank = "better", -1

    monkeypatch.setattr(registry, "BACKENDS", dict(BACKENDS))
    registry.register_backend(Better())
    assert backend_of(torch.device("cpu")).name == "better"


@pytest.mark.parametrize("columns", [1, 64, 100, 513])
def test_rows_of_the_triton_backend(columns):
    _, ternary, _, _ = operands(columns=columns)
    packed = triton_two_bit.pack_rows(ternary)
    assert packed.shape == (24, -(-columns // 64) * 16)
    assert torch.equal(triton_two_bit.unpack_rows(packed, columns), ternary)
