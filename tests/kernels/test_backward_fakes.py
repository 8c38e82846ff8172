"""Shapes and dtypes that the compiler is told, without a GPU: fake CUDA tensors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_bitnet.kernels import matmul, quantize_activations
from sparse_bitnet.kernels import platform as kernels_platform
from sparse_bitnet.kernels.backward import fp8, gradients

TOKENS, OUT, IN = 64, 32, 48


@pytest.fixture
def fake_gpu(monkeypatch):
    def serves(tensor):
        return tensor.device.type == "cuda"

    quantization = __import__(
        "sparse_bitnet.kernels.quantize_activations", fromlist=["quantize_activations"]
    )
    for module in (kernels_platform, fp8, matmul, quantization):
        monkeypatch.setattr(module, "runs_triton", serves)
    monkeypatch.setattr(fp8, "_has_fp8", lambda index: True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


@pytest.mark.parametrize("one_scale", [False, True])
@pytest.mark.parametrize("use_fp8", [False, True])
def test_gradients(fake_gpu, use_fp8, one_scale):
    dy = torch.empty(4, TOKENS // 4, OUT, device="cuda", dtype=torch.bfloat16)
    x = torch.empty(4, TOKENS // 4, IN, device="cuda")
    x_q, x_scale = quantize_activations(x)
    ternary = torch.empty(OUT, IN, dtype=torch.int8, device="cuda")
    w_scale = torch.empty(OUT, device="cuda")
    dx, dw = gradients(dy, x_q, x_scale, ternary, w_scale, one_scale=one_scale, use_fp8=use_fp8)
    assert (dx.shape, dw.shape, dw.dtype) == (x.shape, ternary.shape, torch.float32)
    assert dw.device.type == "cuda"
